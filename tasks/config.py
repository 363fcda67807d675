"""Settings of the tasks. Imports no torch, so that reading a configuration stays fast."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ArithmeticConfig(BaseModel):
    """The `[task]` section of a run on arithmetic with a calculator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["arithmetic"]
    demonstrations: str = Field(min_length=1, description="JSON file: questions with rationales.")
    questions: str = Field(min_length=1, description="JSON file: questions with answers only.")
    tests: tuple[str, ...] = Field(min_length=1, description="JSON files to evaluate on.")
    demonstration_weight: float = Field(
        default=1.0, ge=0, description="Share of draws of one question with a rationale ..."
    )
    question_weight: float = Field(default=0.2, ge=0, description="... and of one without.")
    reward_demonstrations: int = Field(
        default=0, ge=0, description="Worked questions that the reward's context starts with."
    )
    min_len: int = Field(default=1, ge=0, description="Tokens of a rationale before it may stop.")
    stop_after_tool: bool = Field(
        default=True,
        description="A rationale may stop only behind a result of the calculator; false: anywhere.",
    )
    max_len: int = Field(default=48, ge=1, description="Tokens at which it must stop.")

    @model_validator(mode="after")
    def _check_lengths(self) -> "ArithmeticConfig":
        if self.min_len > self.max_len:
            raise ValueError(f"min_len ({self.min_len}) must not exceed max_len ({self.max_len})")
        return self


# One alternative per task; `name` tells them apart.
TaskConfig = ArithmeticConfig
