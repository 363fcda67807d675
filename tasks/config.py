"""Settings of the tasks. Imports no torch, so that reading a configuration stays fast."""

import re
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    SerializeAsAny,
    Tag,
    WrapValidator,
    field_validator,
    model_validator,
)

from actors.reward_query import RewardKind
from lm.config import Frozen
from reward.checks import FUNCTION
from tasks.custom_config import CustomTaskConfig, names_own_task, resolve_own_task
from tasks.held_out import HeldOutConfig
from tasks.records import FILES

_COLUMN = re.compile(r"[^.\[\]!:{}]+")


class Lengths(Frozen):
    """Where a completion may stop."""

    min_len: int = Field(1, ge=0, description="Tokens of a completion before it may stop.")
    max_len: int = Field(24, ge=1, description="Tokens at which it must stop.")
    stop_every: int = Field(1, ge=1)
    """Between them it may stop after every so many tokens only, min_len the first."""
    stop_behind: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """... and only after a token that ends with one of these texts, such as "\\n"; none: after
    any."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_len > self.max_len:
            raise ValueError(f"min_len ({self.min_len}) must not exceed max_len ({self.max_len})")
        return self


class ArithmeticConfig(HeldOutConfig, Lengths):
    """The `[task]` section of a run on arithmetic with a calculator."""

    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["arithmetic"]
    demonstrations: str = Field(min_length=1, json_schema_extra=FILES)
    """JSON file: questions with rationales."""
    questions: str = Field(min_length=1, json_schema_extra=FILES)
    """JSON file: questions with answers only."""
    demonstration_weight: NonNegativeFloat = 1.0
    """Share of draws of one question with a rationale ..."""
    question_weight: float = Field(0.2, ge=0, description="... and of one without.")
    reward_demonstrations: NonNegativeInt = 0
    """Worked questions that the reward's context starts with."""
    stop_after_tool: bool = True
    """A rationale may stop only behind a result of the calculator; false: anywhere."""
    max_len: int = Field(48, ge=1, description="Tokens at which it must stop.")


class RandomNumberConfig(Frozen):
    """The `[task]` section of a run on uniformly random integers."""

    tests: ClassVar[tuple[str, ...]] = ()
    reward_kind: ClassVar[RewardKind] = "function"

    name: Literal["random_number"]
    question: str = Field(
        "The following is a random integer drawn uniformly between 0 and 100:", min_length=1
    )
    """X, which the integer follows."""
    low: int = Field(0, ge=0, description="Smallest valid integer.")
    high: int = Field(100, description="Largest valid integer.")
    penalty_nats: PositiveFloat = 8.0
    """By which each token of an invalid Z lowers log R."""

    @model_validator(mode="after")
    def _check_range(self) -> "RandomNumberConfig":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class _SentenceConfig(HeldOutConfig, Lengths):
    """Keys that tasks of one sentence share."""

    embedder: str | None = None
    """Sentence encoder, folder or hub id, for how alike sentences are, such as
    sentence-transformers/all-mpnet-base-v2; None: by words."""


class InfillingConfig(_SentenceConfig):
    """The `[task]` section of a run on the missing sentence of a story."""

    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["infilling"]
    stories: str = Field(min_length=1, json_schema_extra=FILES)
    """JSON Lines or CSV: stories to train on."""
    demonstrations: NonNegativeInt = 0
    """Stories whose true middle seeds the replay buffer."""


class ContinuationConfig(_SentenceConfig):
    """The `[task]` section of a run on next sentences."""

    reward_kind: ClassVar[RewardKind] = "stop"

    name: Literal["continuation"]
    data: str = Field(min_length=1, json_schema_extra=FILES)
    """Text file: a prompt in each line, to train on."""
    demonstrations: str | None = Field(None, json_schema_extra=FILES)
    """JSON Lines: prompts with the next sentence, which seed the replay buffer and which supervised
    fine-tuning imitates; None: none."""


class SubjectivityConfig(HeldOutConfig, Lengths):
    """The `[task]` section of a run on reasons why a review is objective or subjective."""

    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["subjectivity"]
    reviews: str = Field(min_length=1, json_schema_extra=FILES)
    """JSON Lines: labelled reviews to train on."""
    labels: int | None = Field(None, ge=1)
    """Only so many of them, drawn by the run's seed, of either label alike; None: all."""
    max_len: int = Field(8, ge=1, description="Tokens of a reason at which it must stop.")
    hinted_draws: NonNegativeInt = 0
    """Reasons of each review that seed the replay buffer: drawn of the base LM, behind a prompt
    that gives the label away."""
    wrong_label_penalty: NonNegativeFloat = 0.0
    """Nats by which log R is less behind a reason where the base LM finds the wrong label
    likelier."""


class QuestionsConfig(HeldOutConfig, Lengths):
    """The `[task]` section of a run on somebody's questions (docs/questions.md)."""

    name: Literal["questions"]
    data: str = Field(min_length=1, json_schema_extra=FILES)
    """JSON Lines, JSON, CSV or Parquet to train on, or a dataset of Hugging Face's hub as
    OWNER/NAME:SPLIT (train if none is named)."""
    subset: str | None = Field(None, description="Of such a dataset, as the hub names it.")
    revision: str | None = Field(None, pattern="^[0-9a-f]{40}$")
    """Commit of such a dataset, which it needs: 40 hexadecimal digits."""
    max_questions: int | None = Field(None, ge=1)
    """Of each file or dataset, the first so many; None: all."""
    question: str = Field("question", description="Column with the question.")
    answer: str = Field("answer", description="Column with the true answer.")
    rationale: str = "rationale"
    """Column with a known rationale, where a row has one: a demonstration."""
    x: str = "Question: {question}\nReasoning:"
    """X: {question}, or any other column but the answer's, in a text."""
    y: str = "\nAnswer: {answer}"
    """Y, which follows the rationale: {answer} in a text. "": none, and R is p_LM(Z ⊤ | X), for a
    verifier to judge (reward.terms)."""
    chat: bool = False
    """X is a user's message in the tokenizer's chat template, and Z begins where the assistant's
    turn does."""
    legal: str | None = Field(None, min_length=1)
    """Characters that Z may hold; None: any text."""
    stop: str | None = Field(None, min_length=1)
    """The token that ends Z, as text; None: the one that Y begins with, or the end-of-text token
    where Y begins with the answer."""
    tools: tuple[str, ...] = Field((), max_length=1)
    """Speaks into Z: "calculator", behind "=", or "module:function" of your own."""
    tool_behind: str | None = Field(None, min_length=1)
    """Text behind which a function of your own is called, such as "</search>", however tokens spell
    it; None: "=" at the end of a token."""
    tool_deadline_s: float = Field(5.0, gt=0, description="Longest call of a function of your own.")
    max_len: int = Field(64, ge=1, description="Tokens at which it must stop.")

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if odd := [name for name in names if name != "calculator" and not FUNCTION.fullmatch(name)]:
            raise ValueError(
                f'there is no tool {odd[0]!r}: write "calculator" or "module:function"'
            )
        return names

    @model_validator(mode="after")
    def _check_trigger(self) -> Self:
        if self.tool_behind is not None and self.tools in ((), ("calculator",)):
            raise ValueError(
                f"tool_behind ({self.tool_behind!r}) says where a function of your own is called: "
                'name one in tools, as "module:function"'
            )
        return self

    @property
    def reward_kind(self) -> RewardKind:
        """Of the task's RewardQuery."""
        return "suffix" if self.y else "stop"

    @model_validator(mode="after")
    def _check_templates(self) -> Self:
        asked, answered = _columns_of("x", self.x), _columns_of("y", self.y)
        if not asked or {"answer", self.answer} & set(asked):
            raise ValueError(
                f"x ({self.x!r}) must hold a column in braces, such as {{question}}, and not the "
                "answer, which the policy is to find"
            )
        if self.y and answered != ["answer"]:
            raise ValueError(
                f"y ({self.y!r}) must hold {{answer}} once and no other column; "
                '"" where a verifier alone judges rationales'
            )
        return self


def _columns_of(key: str, template: str) -> list[str]:
    """Those that a template names; raises ValueError for one that cannot be filled in."""
    try:
        parts = [(name, bool(spec or how)) for _, name, spec, how in Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"{key} ({template!r}): {error}; write {{{{ for a brace") from None
    names = [name for name, _ in parts if name is not None]
    if odd := [name for name in names if (name, False) not in parts or not _COLUMN.fullmatch(name)]:
        raise ValueError(
            f"{key} ({template!r}): {{{odd[0]}}} is no plain column; write {{question}}, and "
            "{{ for a brace"
        )
    return names


class ToyConfig(Lengths):
    """The `[task]` section of a run on the enumerable toy."""

    tests: ClassVar[tuple[str, ...]] = ()
    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["toy"]
    min_len: int = Field(0, ge=0, description="Letters of a completion before it may stop.")
    max_len: int = Field(5, ge=1, description="Letters at which it must stop.")
    tool: bool = Field(False, description="'=' asks a tool to add the letters up.")


# Tasks whose completions are whole sentences, measured by what is written.
SENTENCE_TASKS = ("infilling", "continuation")
# Tasks whose language model answers for itself once it has learned rationales: EM makes sense.
EM_TASKS = ("subjectivity", "toy")
# One alternative per task; `name` tells them apart.
ShippedTaskConfig = Annotated[
    ArithmeticConfig
    | ContinuationConfig
    | InfillingConfig
    | QuestionsConfig
    | RandomNumberConfig
    | SubjectivityConfig
    | ToyConfig,
    Field(discriminator="name"),
]


def _origin(value: Any) -> Literal["shipped", "own"]:
    """Of a `[task]` table, or of the settings made from one."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "own" if names_own_task(name) else "shipped"


TaskConfig = Annotated[
    Annotated[ShippedTaskConfig, Tag("shipped")]
    | Annotated[SerializeAsAny[CustomTaskConfig], WrapValidator(resolve_own_task), Tag("own")],
    Discriminator(_origin),
]
