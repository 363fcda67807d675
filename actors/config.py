"""Settings of the rollout actors. Imports no torch, so that reading a configuration stays fast."""

from math import prod
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from lm.config import Frozen


class ActorConfig(Frozen):
    """The `[actors]` section: what one actor samples, and how far ahead it may run.

    The paper trains on 1/4 on-policy, 1/2 tempered and, by the learner, 1/4 replayed trajectories.
    """

    engine: Literal["native", "vllm"] = "native"
    """What samples: our own sampler, or vLLM, an extra (docs/engines.md)."""
    group_size: int = Field(6, ge=1)
    """Completions of one prompt that are sampled together."""
    groups_per_batch: int = Field(8, ge=1)
    """Prompts that are asked at least before newer weights are taken; with --local, those that are
    sampled, scored and stored together."""
    on_policy_share: float = Field(1 / 3, ge=0, le=1)
    """Chance that a group is sampled at temperature 1."""
    temperature_low: PositiveFloat = 0.5
    """Tempered groups draw theirs uniformly from here ..."""
    temperature_high: float = Field(2.0, gt=0, description="... to here.")
    max_rows: int = Field(64, ge=1, description="Completions in the engine's KV cache at once.")
    max_unstored: NonNegativeInt = 0
    """Completions, sampled and not yet stored, at which an actor asks for no more; 0: those of two
    batches."""
    max_ready_groups: int = Field(64, ge=1)
    """Groups in the buffer, undrawn, at which actors pause."""
    lag_versions: NonNegativeInt = 0
    """Sample with weights at least this far behind the newest, to measure what staleness does; 0:
    with the newest."""
    score_timeout_s: PositiveFloat = 300.0
    """Longest wait for the rewards of one batch."""
    tool_timeout_s: PositiveFloat = 600.0
    """Longest wait for a tool and its turn, after which its completion ends without a reward."""
    pace_timeout_s: PositiveFloat = 600.0
    """Longest pause before the learner counts as stalled."""

    @property
    def batch_size(self) -> int:
        """Completions of `groups_per_batch`."""
        return self.groups_per_batch * self.group_size

    @property
    def in_flight_limit(self) -> int:
        """`max_unstored`, its default worked out."""
        return self.max_unstored or 2 * self.batch_size

    @model_validator(mode="before")
    @classmethod
    def _read_batches_in_flight(cls, value: Any) -> Any:
        """Earlier files say `max_in_flight`, in batches; 2 was the default, which runs wrote."""
        if not isinstance(value, dict) or type(value.get("max_in_flight")) is not int:
            return value
        if value.get("max_unstored"):
            raise ValueError(
                "max_in_flight is the earlier name of max_unstored, in batches: leave one of them "
                "out"
            )
        others = {name: value[name] for name in value if name != "max_in_flight"}
        sizes = [
            value.get(name, cls.model_fields[name].default)
            for name in ("groups_per_batch", "group_size")
        ]
        if value["max_in_flight"] == 2 or not all(isinstance(size, int) for size in sizes):
            return others
        return others | {"max_unstored": value["max_in_flight"] * prod(sizes)}

    @model_validator(mode="after")
    def _check_temperatures(self) -> "ActorConfig":
        if self.temperature_low > self.temperature_high:
            raise ValueError(
                f"temperature_low ({self.temperature_low}) must not exceed "
                f"temperature_high ({self.temperature_high})"
            )
        return self
