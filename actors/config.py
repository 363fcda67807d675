"""Settings of the rollout actors. Imports no torch, so that reading a configuration stays fast."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ActorConfig(BaseModel):
    """The `[actors]` section: what one actor samples, and how far ahead it may run.

    The paper trains on 1/4 on-policy, 1/2 tempered and, by the learner, 1/4 replayed trajectories.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["native", "vllm"] = Field(
        default="native",
        description="What samples: our own sampler, or vLLM, an extra (docs/engines.md).",
    )
    group_size: int = Field(
        default=6, ge=1, description="Completions of one prompt that are sampled together."
    )
    groups_per_batch: int = Field(
        default=8, ge=1, description="Prompts that are sampled, scored and stored together."
    )
    on_policy_share: float = Field(
        default=1 / 3, ge=0, le=1, description="Chance that a group is sampled at temperature 1."
    )
    temperature_low: float = Field(
        default=0.5, gt=0, description="Tempered groups draw theirs uniformly from here ..."
    )
    temperature_high: float = Field(default=2.0, gt=0, description="... to here.")
    max_rows: int = Field(
        default=64, ge=1, description="Completions in the engine's KV cache at once."
    )
    max_in_flight: int = Field(
        default=2, ge=1, description="Batches that are sampled and not yet stored."
    )
    max_ready_groups: int = Field(
        default=64, ge=1, description="Groups in the buffer, undrawn, at which actors pause."
    )
    lag_versions: int = Field(
        default=0,
        ge=0,
        description="Sample with weights at least this far behind the newest, to measure what "
        "staleness does; 0: with the newest.",
    )
    score_timeout_s: float = Field(
        default=300.0, gt=0, description="Longest wait for the rewards of one batch."
    )
    pace_timeout_s: float = Field(
        default=600.0, gt=0, description="Longest pause before the learner counts as stalled."
    )

    @property
    def batch_size(self) -> int:
        """Completions that are sampled, scored and stored together."""
        return self.groups_per_batch * self.group_size

    @model_validator(mode="after")
    def _check_temperatures(self) -> "ActorConfig":
        if self.temperature_low > self.temperature_high:
            raise ValueError(
                f"temperature_low ({self.temperature_low}) must not exceed "
                f"temperature_high ({self.temperature_high})"
            )
        return self
