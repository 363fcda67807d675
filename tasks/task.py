"""What a task says to the rest of the system."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.demonstrations import Demonstration, Hint
from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.tools import Tool
from reward.request import ScoreItem
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation
from tasks.held_out import Split, check_split

Answer = int | str  # true or given; equal ones are the same


class Tokenizer(Protocol):
    """What a task needs of a tokenizer."""

    def __len__(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    @property
    def eos_token_id(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TestItem:
    """A held-out prompt to measure on; subclasses add what is known of it."""

    __test__ = False  # for pytest, which collects classes named Test...

    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TestQuestion(TestItem):
    """A question with its true answer."""

    answer: Answer
    group: str = ""  # that it is counted in, such as a number of operands
    unseen: bool  # not in the training data, word for word


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Prompts, legal actions, tool, reward, verdict and measuring of one task."""

    name: str
    actions: ActionSpace
    prompts: Sequence[Prompt]
    reward_query: RewardQuery
    demonstrations: Sequence[Demonstration] = ()
    # X with Y as it stands without a rationale: what supervised fine-tuning learns where there are
    # some, of a task of which nobody wrote rationales.
    answered: Sequence[Demonstration] = ()
    hints: Sequence[Hint] = ()  # behind which the base LM writes what seeds the replay buffer ...
    hinted_draws: int = 0  # ... so many times behind each
    tool: Tool | None = None
    # [S] nats at an item's stop states, untempered; None where the frozen LM scores.
    log_reward: Callable[[ScoreItem], NDArray[np.float32]] | None = None
    # Of each split, file by file: in neither the other split nor the training data.
    held_out: Mapping[Split, Sequence[Sequence[TestItem]]] = field(default_factory=dict)

    def verdict(self, prompt: Prompt, completion: Sequence[int]) -> bool | None:
        """Is the completion right? None where the task cannot tell."""
        return None

    def valid(self, completion: Sequence[int]) -> bool:
        """Is the completion one that the task means at all?"""
        return True

    def check_evaluation(self, split: Split = "test") -> None:
        """Raise, before a run starts, where something that `evaluate` needs is not there.

        Raises NothingToMeasure where only the other split holds anything.
        """
        check_split(self.name, self.held_out, split)

    @abstractmethod
    def evaluate(self, context: EvaluationContext) -> Evaluation:
        """Measure a policy on `context.split`; where nothing is held out, against the posterior."""


@dataclass(frozen=True, kw_only=True)
class QuestionTask(Task):
    """A task whose rationales lead to answers, so that those to held-out questions can be counted:
    by the base LM, which answers behind X Z."""

    held_out: Mapping[Split, Sequence[Sequence[TestQuestion]]] = field(default_factory=dict)
    answer_actions: ActionSpace  # of an answer: any token, until end of text or long enough

    @abstractmethod
    def parse_answer(self, text: str) -> Answer | None:
        """The answer in a text that the base LM wrote behind X Z; None where it is none."""
