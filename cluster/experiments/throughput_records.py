"""What a throughput experiment finds, from the counters of its measurements. No process here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.stats import binom

_CONFIDENCE = 0.95
# Stages that one process does in turn; the busiest process is what limits the rate.
_PROCESSES = (("sampling", "storing"), ("scoring",), ("drawing", "learning"))


class Counts(NamedTuple):
    """What all actors and replicas counted; times in seconds, summed over processes."""

    tokens: float
    sampled: float
    sampling_s: float
    stored: float
    storing_s: float
    scored: float
    scoring_s: float

    def since(self, earlier: "Counts") -> "Counts":
        """What was counted between the two."""
        return Counts(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def tokens_per_trajectory(self) -> float:
        """Mean length of what was sampled."""
        return self.tokens / max(self.sampled, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one measurement saw after its warm-up."""

    rows: list[dict[str, float]]  # the learner's, one for each step
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A median of windows, and an interval for the true median that assumes no distribution."""

    median: float
    low: float
    high: float
    coverage: float  # of the interval, over repetitions of the experiment


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one stage could do by itself, and how much of its time it works."""

    servers: int  # processes that do it side by side
    seconds_per_trajectory: float  # of one server, at work
    trajectories_per_s: float  # of all servers, if they had nothing to wait for
    tokens_per_s: float
    busy: float  # share of the servers' time


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What a batch costs one actor beyond the simulated compute."""

    seconds_per_batch: float
    share: float  # of the simulated compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of actors with one engine."""

    engine: str
    actors: int
    reward_replicas: int
    trajectories_per_s: float  # that were sampled, scored, stored, and learned from
    trajectories_per_s_low: float
    trajectories_per_s_high: float
    interval_coverage: float
    tokens_per_s: float
    efficiency: float  # against `actors` times the rate of one with this engine
    stages: Mapping[str, Stage]
    bottleneck: str
    overhead: Overhead | None  # None with real models, and where actors wait for others


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both modes over the same number of steps and trajectories."""

    steps: int
    trajectories: int
    synchronous_s: float
    asynchronous_s: float

    @property
    def async_over_sync(self) -> float:
        """How many times as fast the asynchronous mode is."""
        return self.synchronous_s / self.asynchronous_s


def window_rates(rows: Sequence[Mapping[str, float]], *, windows: int) -> list[float]:
    """Fresh trajectories per second in each of equally many consecutive optimizer steps.

    The learner's own clock: a step lasts from its draw to its publication, and the next follows at
    once. No window begins or ends in the middle of a batch.
    """
    size = len(rows) // windows
    parts = [rows[first : first + size] for first in range(0, size * windows, size)]
    return [fresh(part) / duration_s(part) for part in parts]


def fresh(rows: Sequence[Mapping[str, float]]) -> float:
    """Trajectories of these steps that no earlier step has drawn."""
    return sum(row["batch/trajectories"] - row["batch/replayed"] for row in rows)


def duration_s(rows: Sequence[Mapping[str, float]]) -> float:
    """Seconds of these steps."""
    return sum(row["time/draw_s"] + row["time/compute_s"] + row["time/publish_s"] for row in rows)


def rate_of(values: Sequence[float]) -> Rate:
    """Median, and the narrowest pair of order statistics around it that covers 95 %.

    Where even the outermost pair covers less (fewer than six values), that pair.
    """
    ordered = sorted(values)
    number = len(ordered)
    # As many values may lie below the interval, and as many above it.
    inside = max(0, int(binom.ppf((1 - _CONFIDENCE) / 2, number, 0.5)) - 1)
    return Rate(
        median=statistics.median(ordered),
        low=ordered[inside],
        high=ordered[number - 1 - inside],
        coverage=float(1 - 2 * binom.cdf(inside, number, 0.5)),
    )


def stages_of(trial: Trial, *, actors: int, replicas: int, rate: float) -> dict[str, Stage]:
    """Every stage by its name, in the order in which a trajectory passes it.

    Args:
        rate: trajectories per second of the whole.
        replicas: 0 where the actors score themselves: then there is no such stage.
    """
    counts, drawn = trial.counts, fresh(trial.rows)
    drawing_s = sum(row["time/draw_s"] - row["time/draw_wait_s"] for row in trial.rows)
    learning_s = sum(row["time/compute_s"] + row["time/publish_s"] for row in trial.rows)
    work = [
        ("sampling", actors, counts.sampling_s, counts.sampled),
        ("scoring", replicas, counts.scoring_s, counts.scored),
        ("storing", actors, counts.storing_s, counts.stored),
        ("drawing", 1, drawing_s, drawn),
        ("learning", 1, learning_s, drawn),
    ]
    stages = {}
    for name, servers, seconds, trajectories in work:
        if servers:
            each_s = max(seconds, 1e-9) / max(trajectories, 1.0)
            capacity = servers / each_s
            stages[name] = Stage(
                servers=servers,
                seconds_per_trajectory=each_s,
                trajectories_per_s=capacity,
                tokens_per_s=capacity * counts.tokens_per_trajectory,
                busy=rate / capacity,
            )
    return stages


def bottleneck_of(stages: Mapping[str, Stage]) -> str:
    """The busiest stage of the process that has least time left."""
    busy = {name: stage.busy for name, stage in stages.items()}
    process = max(_PROCESSES, key=lambda names: sum(busy.get(name, 0.0) for name in names))
    return max(process, key=lambda name: busy.get(name, 0.0))


def overhead_of(*, actors: int, batch: int, rate: float, compute_s: float) -> Overhead:
    """What a batch of one actor took beyond `compute_s`.

    Args:
        batch: trajectories that an actor samples at once.
        rate: trajectories per second of all actors, none of which waits for the learner.
    """
    extra_s = actors * batch / rate - compute_s
    return Overhead(seconds_per_batch=extra_s, share=extra_s / compute_s)
