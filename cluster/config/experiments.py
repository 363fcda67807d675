"""Sections that a run itself does not read: what `compare`, `em` and `throughput` make of it."""

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from lm.config import Frozen


class SearchConfig(Frozen):
    """The `[compare.search]` section: equal trials of every trained method, before test data."""

    learning_rates: tuple[PositiveFloat, ...] = ()
    """learner.learning_rate of the trials, one each, of as many steps as the comparison; the best
    by the task's headline on the validation split is taken. None: no trials, and the file's
    rate."""
    kl: tuple[PositiveFloat, ...] = ()
    """learner.ppo_kl of ppo's trials, which are as many: in an order drawn by the seed, from the
    start again where there are fewer; none: the file's."""
    seed: int = Field(1000, ge=0, description="Of all trials: not of --seeds, which count from 0.")


class CompareConfig(Frozen):
    """The `[compare]` section: what `amortize compare` does otherwise than `amortize train`."""

    methods: tuple[str, ...] = Field(("base", "sft", "ppo", "gflownet"), min_length=1)
    """What is compared, unless --methods says otherwise; docs/compare.md lists all."""
    steps: PositiveInt | None = None
    """Optimizer steps of every method; None: learner.steps."""
    shots: int = Field(0, ge=0, description="Worked questions in front of each, for method base.")
    overrides: dict[str, tuple[str, ...]] = Field({})
    """Of a method alone, such as ppo = ['learner.warmup_steps=50']; what search chooses has the
    last word."""
    search: SearchConfig = SearchConfig()


class SimulationConfig(Frozen):
    """The `[throughput.simulation]` section: the waits that stand for model compute."""

    decode_step_ms: float = Field(50.0, ge=0, description="One decode step of a whole batch.")
    score_call_ms: NonNegativeFloat = 60.0
    """One call of a reward rank: up to reward.token_budget."""
    update_ms: float = Field(50.0, ge=0, description="One optimizer step.")
    adapter_mb: float = Field(4.0, gt=0, description="Megabytes of an adapter as published.")
    balanced_ms: PositiveFloat = 600.0
    """Sampling a batch, scoring it and one optimizer step, each, where synchronous and asynchronous
    mode are compared."""


class ThroughputConfig(Frozen):
    """The `[throughput]` section: how rates are measured."""

    warm_up_batches: int = Field(2, ge=1, description="Batches of each actor before any counts.")
    batches: int = Field(2, ge=1, description="Batches of each actor in one repeat.")
    repeats: int = Field(6, ge=2)
    """Repeats; their median counts. Six are the fewest that hold the true median between them at 95
    %."""
    comparison_steps: int = Field(12, ge=2)
    """Optimizer steps counted in each mode that is compared."""
    simulation: SimulationConfig = SimulationConfig()


class EMConfig(Frozen):
    """The `[em]` section: rounds of E-steps and M-steps."""

    rounds: int = Field(1, ge=1, description="Of an E-step, which trains a policy, and an M-step.")
    rationales: int = Field(64, ge=1)
    """Z per prompt that an M-step draws of the policy."""
    overrides: tuple[str, ...] = ()
    """Of M-steps alone, such as ['learner.steps=50']."""
    policy: str | None = None
    """Folder of the adapter that an M-step draws Z of; `amortize em` sets it."""
