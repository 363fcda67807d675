"""Settings of expectation maximisation. Imports no torch."""

from pydantic import BaseModel, ConfigDict, Field


class EMConfig(BaseModel):
    """The `[em]` section: rounds of E-steps and M-steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(
        default=1, ge=1, description="An E-step, which trains a policy, and an M-step each."
    )
    rationales: int = Field(
        default=64, ge=1, description="Z that an M-step draws of the policy for every prompt."
    )
    overrides: tuple[str, ...] = Field(
        default=(), description="Of M-steps alone, such as ['learner.steps=50']."
    )
    policy: str | None = Field(
        default=None,
        description="Folder of the adapter that an M-step draws Z of; `amortize em` sets it.",
    )
