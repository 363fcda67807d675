"""What the buffer holds and what became of everything it ever accepted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

_BY_RULE = ("duplicates", "near_rejected", "near_replaced", "evicted_quota", "evicted_capacity")
LEAVING_REPLAY = (*_BY_RULE, "quarantined")
LEAVING_FRESH = ("groups_exhausted", "groups_expired", "groups_dropped", "groups_quarantined")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Since the run began, of trajectories and groups: what was accepted is stored, or has left."""

    offered: int = 0
    duplicates: int = 0
    near_rejected: int = 0
    near_replaced: int = 0
    evicted_quota: int = 0
    evicted_capacity: int = 0
    quarantined: int = 0
    groups_accepted: int = 0
    groups_exhausted: int = 0  # drawn max_draws times
    groups_expired: int = 0  # older than max_age
    groups_dropped: int = 0  # beyond fresh_capacity
    groups_quarantined: int = 0
    groups_drawn: int = 0  # draws, each of them counted

    @classmethod
    def read(cls, meta: Mapping[str, int]) -> Self:
        """The counters among other numbers by name; what is missing was never counted."""
        return cls(**{field.name: meta.get(field.name, 0) for field in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStats:
    """Sizes and ages as of one instant; zeros where there is nothing to average."""

    replay_size: int  # trajectories
    replay_prompts: int  # prompts that were ever written
    times_sampled_mean: float  # draws from replay per trajectory in it
    times_sampled_max: int
    fresh_groups: int
    undrawn_groups: int
    version: int  # the learner's, at its last draw
    age_mean_versions: float  # of fresh groups
    age_max_versions: int
    counters: Counters


def summarise(
    meta: Mapping[str, int],
    replay_size: int,
    replay_prompts: int,
    times_sampled: Sequence[int],
    fresh_versions: Sequence[int],
    undrawn_groups: int,
) -> ReplayStats:
    """The statistics of a store; `meta` has the counters, and `version` once there was a draw.

    `times_sampled` is of the items ever drawn, `fresh_versions` the lowest of each waiting group.
    """
    # Until the learner has drawn once nobody has an age.
    ages = [meta["version"] - version for version in fresh_versions] if "version" in meta else []
    return ReplayStats(
        replay_size=replay_size,
        replay_prompts=replay_prompts,
        times_sampled_mean=sum(times_sampled) / max(replay_size, 1),
        times_sampled_max=max(times_sampled, default=0),
        fresh_groups=len(fresh_versions),
        undrawn_groups=undrawn_groups,
        version=meta.get("version", 0),
        age_mean_versions=sum(ages) / max(len(ages), 1),
        age_max_versions=max(ages, default=0),
        counters=Counters.read(meta),
    )
