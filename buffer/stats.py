"""What the buffer holds and what became of everything it ever accepted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from redis.client import Pipeline

from buffer.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Since the run began. Replay counts trajectories, fresh counts groups.

    offered = stored + duplicates + near_rejected + near_replaced + evicted_quota
              + evicted_capacity + quarantined
    groups_accepted = waiting + groups_exhausted + groups_expired + groups_dropped
              + groups_quarantined
    """

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

    @property
    def left_replay(self) -> int:
        """Trajectories offered to replay that are not in it."""
        return (
            self.duplicates
            + self.near_rejected
            + self.near_replaced
            + self.evicted_quota
            + self.evicted_capacity
            + self.quarantined
        )

    @property
    def left_fresh(self) -> int:
        """Groups accepted that no longer wait."""
        return (
            self.groups_exhausted
            + self.groups_expired
            + self.groups_dropped
            + self.groups_quarantined
        )


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


def read_stats(store: Store) -> ReplayStats:
    """Read the statistics; costs the index of fresh groups and one number per drawn item."""

    def ask(pipeline: Pipeline) -> None:
        pipeline.hgetall(store.key("meta"))
        pipeline.zcard(store.key("priority"))
        pipeline.hlen(store.key("revision"))
        pipeline.hvals(store.key("sampled"))
        pipeline.zrange(store.key("fresh"), 0, -1, withscores=True)
        pipeline.zcard(store.key("undrawn"))

    meta, size, prompts, sampled, fresh, undrawn = store.pipeline(ask)
    version = int(meta.get(b"version", 0))
    # Until the learner has drawn once nobody has an age.
    ages = [version - int(sampled_at) for _, sampled_at in fresh] if b"version" in meta else []
    times = [int(count) for count in sampled]
    return ReplayStats(
        replay_size=size,
        replay_prompts=prompts,
        times_sampled_mean=sum(times) / max(size, 1),
        times_sampled_max=max(times, default=0),
        fresh_groups=len(fresh),
        undrawn_groups=undrawn,
        version=version,
        age_mean_versions=sum(ages) / max(len(ages), 1),
        age_max_versions=max(ages, default=0),
        counters=read_counters(meta),
    )


def read_counters(meta: Mapping[bytes, bytes]) -> Counters:
    """The counters among the fields of the meta hash."""
    return Counters(
        **{field.name: int(meta.get(field.name.encode(), 0)) for field in fields(Counters)}
    )
