"""Sections that a run itself does not read: what `compare`, `em` and `throughput` make of it."""

from pydantic import BaseModel, ConfigDict, Field


class CompareConfig(BaseModel):
    """The `[compare]` section: what `amortize compare` does otherwise than `amortize train`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = Field(
        default=("base", "sft", "ppo", "gflownet"),
        min_length=1,
        description="What is compared, unless --methods says otherwise; docs/compare.md lists all.",
    )
    steps: int | None = Field(
        default=None, gt=0, description="Optimizer steps of every method; None: learner.steps."
    )
    shots: int = Field(
        default=0, ge=0, description="Worked questions in front of each, for method base."
    )
    overrides: dict[str, tuple[str, ...]] = Field(
        default={},
        description="Of a method alone, such as ppo = ['learner.learning_rate=3e-4']: what a fair "
        "comparison must tune.",
    )


class SimulationConfig(BaseModel):
    """The `[throughput.simulation]` section: the waits that stand for model compute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decode_step_ms: float = Field(
        default=50.0, ge=0, description="One decode step of all rows of a batch."
    )
    score_call_ms: float = Field(
        default=60.0, ge=0, description="One call of a reward rank: up to reward.token_budget."
    )
    update_ms: float = Field(default=50.0, ge=0, description="One optimizer step.")
    adapter_mb: float = Field(
        default=4.0, gt=0, description="Megabytes of the adapter that is published."
    )
    balanced_ms: float = Field(
        default=600.0,
        gt=0,
        description="Sampling a batch, scoring it and one optimizer step, each, where synchronous "
        "and asynchronous mode are compared.",
    )


class ThroughputConfig(BaseModel):
    """The `[throughput]` section: how rates are measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warm_up_batches: int = Field(
        default=2, ge=1, description="Batches of each actor before anything is counted."
    )
    batches: int = Field(default=2, ge=1, description="Batches of each actor in one repeat.")
    repeats: int = Field(
        default=6,
        ge=2,
        description="Repeats; their median counts. Six are the fewest that hold the true median "
        "between them at 95 %.",
    )
    comparison_steps: int = Field(
        default=12, ge=2, description="Optimizer steps counted in each mode that is compared."
    )
    simulation: SimulationConfig = SimulationConfig()


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
