"""What is asked: prompts with their answers, and the endless stream that an actor draws from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question X with its answer Y."""

    key: str  # stable name of the pair (X, Y)
    text: str  # X as text, for people
    prompt: tuple[int, ...]  # token ids of X, what the policy conditions on
    answer: tuple[int, ...]  # token ids of Y; empty where the task has none
    weight: float = 1.0  # relative share of draws
    # Token ids of X as the frozen LM reads it, where the policy is shown something else, such as X
    # and Y in one; None: `prompt`.
    scored: tuple[int, ...] | None = None
    record: str = ""  # JSON object that verifiers get, such as a row of data; "": of X and Y

    @property
    def scored_prompt(self) -> tuple[int, ...]:
        """Token ids of X as the frozen LM reads it."""
        return self.prompt if self.scored is None else self.scored


def key_of(content: str) -> str:
    """A key of 32 characters, the same for the same content."""
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class PromptStream:
    """Draws prompts by weight, with replacement, for ever; two actors need two seeds of `rng`."""

    def __init__(self, prompts: Sequence[Prompt], rng: np.random.Generator) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt; the task has none")
        weights = np.array([prompt.weight for prompt in prompts], dtype=np.float64)
        if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
            raise ValueError(
                f"prompt weights must be finite, >= 0 and not all 0; got "
                f"min {weights.min()}, max {weights.max()}, sum {weights.sum()}"
            )
        self._prompts = tuple(prompts)
        self._probabilities = weights / weights.sum()
        self.rng = rng

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        drawn = self.rng.choice(len(self._prompts), size=count, p=self._probabilities)
        return [self._prompts[index] for index in drawn]
