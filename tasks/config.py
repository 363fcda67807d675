"""Settings of the tasks. Imports no torch, so that reading a configuration stays fast."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    WrapValidator,
    model_validator,
)

from actors.reward_query import RewardKind
from tasks.custom_config import CustomTaskConfig, names_own_task, resolve_own_task
from tasks.held_out import HeldOutConfig
from tasks.records import FILES


class Lengths(BaseModel):
    """Where a completion may stop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_len: int = Field(default=1, ge=0, description="Tokens of a completion before it may stop.")
    max_len: int = Field(default=24, ge=1, description="Tokens at which it must stop.")
    stop_every: int = Field(
        default=1,
        ge=1,
        description="Between them it may stop after every so many tokens only, min_len the first.",
    )
    stop_behind: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description='... and only after a token that ends with one of these texts, such as "\\n"; '
        "none: after any.",
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_len > self.max_len:
            raise ValueError(f"min_len ({self.min_len}) must not exceed max_len ({self.max_len})")
        return self


class ArithmeticConfig(HeldOutConfig, Lengths):
    """The `[task]` section of a run on arithmetic with a calculator."""

    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["arithmetic"]
    demonstrations: str = Field(
        min_length=1, description="JSON file: questions with rationales.", json_schema_extra=FILES
    )
    questions: str = Field(
        min_length=1, description="JSON file: questions with answers only.", json_schema_extra=FILES
    )
    demonstration_weight: float = Field(
        default=1.0, ge=0, description="Share of draws of one question with a rationale ..."
    )
    question_weight: float = Field(default=0.2, ge=0, description="... and of one without.")
    reward_demonstrations: int = Field(
        default=0, ge=0, description="Worked questions that the reward's context starts with."
    )
    stop_after_tool: bool = Field(
        default=True,
        description="A rationale may stop only behind a result of the calculator; false: anywhere.",
    )
    max_len: int = Field(default=48, ge=1, description="Tokens at which it must stop.")


class RandomNumberConfig(BaseModel):
    """The `[task]` section of a run on uniformly random integers."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tests: ClassVar[tuple[str, ...]] = ()
    reward_kind: ClassVar[RewardKind] = "function"

    name: Literal["random_number"]
    question: str = Field(
        default="The following is a random integer drawn uniformly between 0 and 100:",
        min_length=1,
        description="X, which the integer follows.",
    )
    low: int = Field(default=0, ge=0, description="Smallest valid integer.")
    high: int = Field(default=100, description="Largest valid integer.")
    penalty_nats: float = Field(
        default=8.0, gt=0, description="By which each token of an invalid Z lowers log R."
    )

    @model_validator(mode="after")
    def _check_range(self) -> "RandomNumberConfig":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class _SentenceConfig(HeldOutConfig, Lengths):
    """Keys that tasks of one sentence share."""

    embedder: str | None = Field(
        default=None,
        description="Sentence encoder, folder or hub id, for how alike sentences are, such as "
        "sentence-transformers/all-mpnet-base-v2; None: by words.",
    )


class InfillingConfig(_SentenceConfig):
    """The `[task]` section of a run on the missing sentence of a story."""

    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["infilling"]
    stories: str = Field(
        min_length=1, description="JSON Lines or CSV: stories to train on.", json_schema_extra=FILES
    )
    demonstrations: int = Field(
        default=0, ge=0, description="Stories whose true middle seeds the replay buffer."
    )


class ContinuationConfig(_SentenceConfig):
    """The `[task]` section of a run on next sentences."""

    reward_kind: ClassVar[RewardKind] = "stop"

    name: Literal["continuation"]
    data: str = Field(
        min_length=1,
        description="Text file: a prompt in each line, to train on.",
        json_schema_extra=FILES,
    )
    demonstrations: str | None = Field(
        default=None,
        description="JSON Lines: prompts with the next sentence, which seed the replay buffer and "
        "which supervised fine-tuning imitates; None: none.",
        json_schema_extra=FILES,
    )


class SubjectivityConfig(HeldOutConfig, Lengths):
    """The `[task]` section of a run on reasons why a review is objective or subjective."""

    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["subjectivity"]
    reviews: str = Field(
        min_length=1,
        description="JSON Lines: labelled reviews to train on.",
        json_schema_extra=FILES,
    )
    labels: int | None = Field(
        default=None,
        ge=1,
        description="Only so many of them, drawn by the run's seed, of either label alike; "
        "None: all.",
    )
    max_len: int = Field(default=8, ge=1, description="Tokens of a reason at which it must stop.")


class ToyConfig(Lengths):
    """The `[task]` section of a run on the enumerable toy."""

    tests: ClassVar[tuple[str, ...]] = ()
    reward_kind: ClassVar[RewardKind] = "suffix"

    name: Literal["toy"]
    min_len: int = Field(default=0, ge=0, description="Letters of a completion before it may stop.")
    max_len: int = Field(default=5, ge=1, description="Letters at which it must stop.")
    tool: bool = Field(default=False, description="'=' asks a tool to add the letters up.")


# Tasks whose completions are whole sentences, measured by what is written.
SENTENCE_TASKS = ("infilling", "continuation")
# Tasks whose language model answers for itself once it has learned rationales: EM makes sense.
EM_TASKS = ("subjectivity", "toy")
# One alternative per task; `name` tells them apart.
ShippedTaskConfig = Annotated[
    ArithmeticConfig
    | ContinuationConfig
    | InfillingConfig
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
