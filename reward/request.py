"""What is asked of the reward model: a rationale with its context, stop states and answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class BadItem(ValueError):
    """An item that cannot be scored; fails the request it came with and no other."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreItem:
    """Asks for log p(z_1:t Y | context) in nats at every stop state t of the completion Z.

    A `stop` reward log p(z_1:t ⊤ | context) is the item whose answer is the stop token alone.
    """

    context: Tokens  # [P] what Z follows, P >= 1
    completion: Tokens  # [L] Z, inserted tool text included, stop token excluded
    stops: NDArray[np.int32]  # [S] strictly increasing prefix lengths t, 0 <= t <= L
    answer: Tokens  # [A] Y, A >= 1
    record: str = ""  # JSON object that verifiers get; nothing to the LM
    shared: int = (
        0  # tokens at the head of the context that other items have too: no score's matter
    )

    @classmethod
    def of(
        cls,
        context: Sequence[int],
        completion: Sequence[int] | Tokens,
        *,
        stops: Sequence[int] | Tokens,
        answer: Sequence[int],
        record: str = "",
        shared: int = 0,
    ) -> Self:
        """From any rows of integers."""
        rows = {"context": context, "completion": completion, "stops": stops, "answer": answer}
        arrays = {name: np.asarray(row, dtype=np.int32) for name, row in rows.items()}
        return cls(**arrays, record=record, shared=shared)

    @property
    def key(self) -> bytes:
        """Content of the item: two items with the same key have the same scores by the LM."""
        parts = (self.context, self.completion, self.stops, self.answer)
        sizes = [len(part) for part in parts]
        return b"".join(np.asarray(part, dtype=np.int32).tobytes() for part in (sizes, *parts))

    @property
    def num_tokens(self) -> int:
        """Tokens of a packed pass over this item alone."""
        copies = len(self.stops) * (len(self.answer) - 1)
        return len(self.context) + len(self.completion) + copies


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLimits:
    """What a model can score."""

    vocab_size: int  # token ids are below it
    max_length: int  # positions of the model, or its attention window where that is shorter


def check_item(item: ScoreItem, limits: ScoreLimits) -> None:
    """Raise BadItem, which names field, value and bound, if the model cannot score the item."""
    for name in ("context", "completion", "answer"):
        tokens = getattr(item, name)
        if tokens.ndim != 1 or tokens.dtype.kind != "i":
            raise BadItem(f"{name} must be one row of token ids, not {tokens.dtype} {tokens.shape}")
        outside = (tokens < 0) | (tokens >= limits.vocab_size)
        if outside.any():
            at = int(outside.argmax())
            raise BadItem(
                f"{name}[{at}] is token {tokens[at]}, outside the vocabulary of {limits.vocab_size}"
            )
    if not len(item.context):
        raise BadItem("context is empty: give it at least a start-of-text token")
    if not len(item.answer):
        raise BadItem("answer is empty: the reward is log p(Z Y | context) and needs a Y")
    stops, last = item.stops, len(item.completion)
    if stops.ndim != 1 or not len(stops) or (np.diff(stops) <= 0).any():
        raise BadItem(f"stops must be strictly increasing and not empty, not {stops.tolist()}")
    if stops[0] < 0 or stops[-1] > last:
        raise BadItem(f"stops {stops.tolist()} leave the completion's states 0..{last}")
    length = len(item.context) + len(item.completion) + len(item.answer)
    if length > limits.max_length:
        raise BadItem(
            f"context + completion + answer is {length} tokens, the model holds"
            f" {limits.max_length}: shorten the prompt or lower max_len"
        )
