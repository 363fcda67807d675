"""Settings of measuring a policy, on test data and against the posterior. Imports no torch."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from lm.config import Frozen
from tasks.held_out import Split


class EvaluationConfig(Frozen):
    """The `[evaluation]` section: how answers are drawn before training and after it."""

    split: Split = "test"
    """Held-out data to measure on: choices are made on validation."""
    samples: int = Field(10, ge=1, description="Answers per item; the commonest counts.")
    temperature: float = Field(0.1, gt=0, description="At which answers are drawn.")
    max_rows: int = Field(256, ge=1, description="Completions sampled at once.")
    max_items: int | None = Field(None, ge=1)
    """Items of each test file that are asked; None: all."""
    shots: NonNegativeInt = 0
    """Worked questions in front of each, when the base LM is asked without an adapter."""
    diversity_items: NonNegativeInt = 50
    """Items of each test file for which samples at temperature 1 are drawn too, to see how much
    they differ; 0: none."""
    decoding: Literal["sample", "beam", "diverse_beam"] = "sample"
    """How sentences are written (tasks infilling and continuation): drawn, or the ends of a beam
    search of as many beams, in one group or in groups of one."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Mass of the nucleus that they are drawn from."""
    diversity_penalty: NonNegativeFloat = 1.0
    """Nats that a token costs a beam for each earlier group that just took it."""
    candidates: int = Field(1, ge=1)
    """Times `samples` sentences are written; the likeliest different ones count."""
    examples: int = Field(6, ge=0, description="Rationales that the report shows.")
    seed: int = Field(0, ge=0, description="Of the draws: before and after share it.")


class PosteriorConfig(Frozen):
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
