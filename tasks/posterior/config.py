"""Settings of comparing a policy with the posterior. Imports no torch."""

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class PosteriorConfig(BaseModel):
    """The `[posterior]` section: how a policy is compared with the exact posterior."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: int = Field(
        default=4, ge=1, description="Prompts compared: the first distinct ones of the task."
    )
    tolerance: float = Field(
        default=1e-3,
        ge=0,
        lt=1,
        description="Mass of policy and posterior that may stay out of an enumeration; 0: none.",
    )
    max_nodes: int = Field(
        default=50_000,
        ge=0,
        description="Prefixes visited for one prompt. One that needs more counts as not "
        "enumerable, and only bounds are given; 0: bounds alone.",
    )
    samples: int = Field(
        default=1000, ge=10, description="Completions of the policy, for its log Z and the bounds."
    )
    iwae_sizes: tuple[PositiveInt, ...] = Field(
        default=(8, 64), description="K of the IWAE bounds of log Z."
    )
    draws: int = Field(
        default=1000,
        ge=0,
        description="Texts that the base LM writes freely, in which samples of the posterior are "
        "looked for (at temperature 1).",
    )
