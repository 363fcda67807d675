"""Settings of comparing a policy with the posterior. Imports no torch."""

from pydantic import Field, NonNegativeInt, PositiveInt

from lm.config import Section


class PosteriorConfig(Section):
    """The `[posterior]` section: how a policy is compared with the exact posterior."""

    prompts: int = Field(4, ge=1)
    """Prompts compared: the first distinct ones of the task."""
    tolerance: float = Field(1e-3, ge=0, lt=1)
    """Mass of policy and posterior that may stay out of an enumeration; 0: none."""
    max_nodes: NonNegativeInt = 50_000
    """Prefixes visited for one prompt. One that needs more counts as not enumerable, and only
    bounds are given; 0: bounds alone."""
    samples: int = Field(1000, ge=10)
    """Completions of the policy, for its log Z and the bounds."""
    iwae_sizes: tuple[PositiveInt, ...] = (8, 64)
    """K of the IWAE bounds of log Z."""
    draws: NonNegativeInt = 1000
    """Texts that the base LM writes freely, in which samples of the posterior are looked for (at
    temperature 1)."""
