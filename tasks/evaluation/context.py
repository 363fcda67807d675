"""What a task is given to measure a policy with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lm.actions import ActionSpace
from lm.model import CausalLM
from lm.sampling import Completion, Request, Sampler
from lm.shared import SharedModel
from lm.tools import Tool, ToolFault, unfailing
from reward.terms import RewardTerms
from tasks.evaluation.config import EvaluationConfig, PosteriorConfig
from tasks.held_out import Split

Draw = Callable[[Sequence[Request]], list[Completion]]  # one for each request, in order
Attempts = list[list[Completion | ToolFault]]  # behind each text
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationContext:
    """A policy, the frozen LM that it comes from, and how it is measured."""

    language_model: SharedModel  # of the policy, and the frozen LM
    adapter: Path | None  # that makes the policy of the LM; None: the LM is the policy
    answering: SharedModel | None = None  # the LM that an M-step left, which answers for the other
    imitates: bool = False  # the adapter was fine-tuned on demonstrations or answers
    settings: EvaluationConfig
    posterior: PosteriorConfig
    temperature: float  # T: the posterior is proportional to R^(1/T)
    seed: int  # of worked examples, and of draws that are compared with the posterior
    token_budget: int  # of a padded micro-batch that the frozen LM scores
    terms: RewardTerms | None = None  # of which log R is the sum; None: what the task says
    progress: Callable[[str], None] = lambda stage: None  # is told what is being done

    @property
    def split(self) -> Split:
        """Of the held-out data: choices are made on the validation split."""
        return self.settings.split

    @property
    def shots(self) -> int:
        """Worked examples that stand in front of a question: for the LM by itself alone."""
        return self.settings.shots if self.adapter is None else 0

    def draw(
        self, actions: ActionSpace, texts: Sequence[tuple[int, ...]], count: int, **settings: Any
    ) -> list[list[Completion]]:
        """As `attempt`, all of them; raises what a tool raised where it ended one twice."""
        return [unfailing(same) for same in self.attempt(actions, texts, count, **settings)]

    def attempt(
        self,
        actions: ActionSpace,
        texts: Sequence[tuple[int, ...]],
        count: int,
        *,
        tool: Tool | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Attempts:
        """`count` completions of the policy behind each text, or what a tool ended them with; see
        `drawing`.

        Raises FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        """
        requests = [
            Request(prompt=text, temperature=temperature, top_p=top_p)
            for text in texts
            for _ in range(count)
        ]
        with self.language_model.with_adapter(self.adapter) as model:
            sampler, generator = self._sampler(model, actions, tool, seed)
            drawn = sampler.attempt(requests, generator, self._counting(len(requests)))
        return [drawn[at : at + count] for at in range(0, len(drawn), count)]

    def drawing(
        self,
        model: CausalLM,
        actions: ActionSpace,
        tool: Tool | None = None,
        *,
        seed: int | None = None,
    ) -> Draw:
        """Draws from `model` by the seed; None: that of the settings."""
        sampler, generator = self._sampler(model, actions, tool, seed)
        return lambda requests: unfailing(
            sampler.attempt(requests, generator, self._counting(len(requests)))
        )

    def _counting(self, number: int) -> Callable[[int], None]:
        return lambda ended: self.progress(f"{ended} of {number} texts")

    def _sampler(
        self, model: CausalLM, actions: ActionSpace, tool: Tool | None, seed: int | None
    ) -> tuple[Sampler, torch.Generator]:
        generator = torch.Generator(device=model.device)
        generator.manual_seed(self.settings.seed if seed is None else seed)
        return Sampler(model, actions, tool, max_rows=self.settings.max_rows), generator

    def items(
        self, held_out: Mapping[Split, Sequence[Sequence[Item]]], *, at_most: int | None = None
    ) -> list[Item]:
        """Those of the split: `evaluation.max_items` of each file, and `at_most` so many."""
        files = [file[: self.settings.max_items] for file in held_out.get(self.split, ())]
        return [item for file in files for item in file[:at_most]]
