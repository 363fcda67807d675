"""What a task says to the rest of the system."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
from tasks.held_out import Split

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


class Task(Protocol):
    """Prompts, legal actions, tool, reward, verdict and measuring of one task."""

    @property
    def name(self) -> str: ...

    @property
    def actions(self) -> ActionSpace: ...

    @property
    def tool(self) -> Tool | None: ...

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    def demonstrations(self) -> Sequence[Demonstration]: ...

    @property
    def reward_query(self) -> RewardQuery: ...

    @property
    def log_reward(self) -> Callable[[ScoreItem], NDArray[np.float32]] | None:
        """[S] nats at an item's stop states, untempered; None where the frozen LM scores."""

    def verdict(self, prompt: Prompt, completion: Sequence[int]) -> bool | None:
        """Is the completion right? None where the task cannot tell."""

    def valid(self, completion: Sequence[int]) -> bool:
        """Is the completion one that the task means at all?"""

    @property
    def held_out(self) -> Mapping[Split, Sequence[Sequence[TestItem]]]:
        """Items of each split, file by file: in neither the other split nor the training data."""

    def check_evaluation(self, split: Split = "test") -> None:
        """Raise, before a run starts, where something that `evaluate` needs is not there."""

    def evaluate(self, context: EvaluationContext) -> Evaluation:
        """Measure a policy on `context.split`; where nothing is held out, against the posterior."""


@runtime_checkable
class AnsweredTask(Task, Protocol):
    """A task that has answers to learn from, and nobody's rationales."""

    @property
    def answered(self) -> Sequence[Demonstration]:
        """X with Y as it stands without a rationale, each; what supervised fine-tuning learns."""


@runtime_checkable
class HintedTask(Task, Protocol):
    """A task that has the base LM write what seeds the replay buffer."""

    @property
    def hints(self) -> Sequence[Hint]: ...

    @property
    def hinted_draws(self) -> int:
        """Of each hint."""


@runtime_checkable
class QuestionTask(Task, Protocol):
    """A task whose rationales lead to answers, so that those to held-out TestQuestions can be
    counted."""

    @property
    def held_out(self) -> Mapping[Split, Sequence[Sequence[TestQuestion]]]: ...

    @property
    def answer_actions(self) -> ActionSpace:
        """How the base LM answers: any token, until end of text or long enough."""

    def parse_answer(self, text: str) -> Answer | None:
        """The answer in a text that the base LM wrote behind X Z; None where it is none."""
