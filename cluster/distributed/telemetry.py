"""The metrics of a run: their definitions, and Ray's hand-over of them to Prometheus."""

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from ray.util.metrics import Counter, Gauge

from buffer.stats import ReplayStats

_TAGS = ("run", "part")


class Source(StrEnum):
    """What a metric is read from; one `part` of a run stands for each reading."""

    ACTOR = "actor"  # counters of `actors.actor`; part: actor-0, ...
    REPLICA = "reward"  # counters of `reward.replica`; part: reward-0, ...
    LEARNER = "learner"  # its status, and metrics as averaged by `cluster.run.progress`
    BUFFER = "buffer"  # `buffer.stats`
    PART = "part"  # part: that which was started, actor-0, reward-0, learner, ...
    KIND = "kind"  # part: actors, replicas


class Instrument(NamedTuple):
    """One metric. Names end in the unit; counters only grow."""

    is_counter: bool
    what: str
    key: str  # in the values of its source
    description: str

    @property
    def name(self) -> str:
        return f"amortize_{self.what}"


_counter, _gauge = partial(Instrument, True), partial(Instrument, False)

INSTRUMENTS: dict[Source, tuple[Instrument, ...]] = {
    Source.ACTOR: (
        _counter("actor_trajectories", "trajectories", "Trajectories stored in the buffer."),
        _counter("actor_tokens", "tokens", "Tokens sampled."),
        _counter("actor_unscored_trajectories", "unscored", "Trajectories without a reward."),
        _counter("actor_tool_failures", "tool_failures", "Completions that a failing tool ended."),
        _counter("actor_judged_trajectories", "gradable", "Trajectories that are right or wrong."),
        _counter("actor_correct_trajectories", "correct", "Of those, the correct ones."),
        _gauge("actor_policy_version", "version", "Version of the weights it samples from."),
        _counter("actor_sampling_seconds", "sampling_s", "Time spent sampling."),
        _counter("actor_scoring_wait_seconds", "scoring_wait_s", "Time spent waiting for rewards."),
        _counter("actor_storing_seconds", "storing_s", "Time spent storing trajectories."),
        _counter("actor_paced_seconds", "paced_s", "Time spent waiting for the learner to draw."),
        _counter("actor_scoring_retries", "scoring_retries", "Scorings that were asked for again."),
        _counter("actor_verifier_failures", "verifier_failures", "Verifications that failed."),
    ),
    Source.REPLICA: (
        _gauge("reward_queued_requests", "queued_requests", "Requests that wait for a pass."),
        _gauge("reward_queued_items", "queued_items", "Trajectories in those requests."),
        _counter("reward_answered_requests", "answered_requests", "Requests scored."),
        _counter("reward_answered_items", "answered_items", "Trajectories scored."),
        _counter("reward_computed_items", "computed_items", "Of those, not remembered."),
        _counter("reward_computed_tokens", "computed_tokens", "Tokens of the passes, padded."),
        _counter("reward_queue_seconds", "queued_s", "Time in the queue, summed over requests."),
        _counter("reward_computing_seconds", "computing_s", "Time spent in passes."),
        _counter("reward_idle_seconds", "waiting_s", "Time spent without a request."),
        _counter("reward_expired_requests", "expired_requests", "Requests too old to score."),
        _counter("reward_failed_requests", "failed_requests", "Requests whose pass failed."),
    ),
    Source.LEARNER: (
        _gauge("learner_step", "step", "Optimizer steps done."),
        _gauge("learner_policy_version", "version", "Version of its weights."),
        _gauge("learner_loss", "loss/value", "Loss of the objective."),
        _gauge("learner_grad_norm", "optim/grad_norm", "Norm of the gradient before clipping."),
        _gauge("learner_log_reward_nats", "reward/log_mean_nats", "Mean log R of fresh ones."),
        _gauge("learner_correct_ratio", "reward/correct_fraction", "Correct among fresh ones."),
        _gauge("learner_elbo_nats", "posterior/elbo_nats", "Lower bound of log Z."),
        _gauge("learner_iwae_gap_nats", "posterior/iwae_gap_nats", "How much more samples add."),
        _gauge("learner_age_mean_versions", "policy/age_mean_versions", "Age of what it draws."),
        _gauge("learner_age_max_versions", "policy/age_max_versions", "Largest age of it."),
        _gauge("learner_agreement_max_nats", "agreement/max_nats", "Gap to the actors' log q."),
        _gauge("learner_draw_seconds", "time/draw_s", "Time of a step spent waiting for data."),
        _gauge("learner_compute_seconds", "time/compute_s", "Time of a step spent computing."),
        _gauge("learner_publish_seconds", "time/publish_s", "Time of a step spent publishing."),
    ),
    Source.BUFFER: (
        _gauge("buffer_trajectories", "replay_size", "Trajectories in replay."),
        _gauge("buffer_fresh_groups", "fresh_groups", "Groups that may be drawn fresh."),
        _gauge("buffer_undrawn_groups", "undrawn_groups", "Of those, drawn by nobody yet."),
        _gauge("buffer_age_mean_versions", "age_mean_versions", "Mean age of fresh groups."),
        _gauge("buffer_age_max_versions", "age_max_versions", "Largest age of a fresh group."),
        _counter("buffer_offered_trajectories", "offered", "Trajectories offered to replay."),
        _counter("buffer_duplicate_trajectories", "duplicates", "Known already."),
        _counter("buffer_near_rejected_trajectories", "near_rejected", "Too like a better one."),
        _counter("buffer_near_replaced_trajectories", "near_replaced", "Gave way to one like it."),
        _counter("buffer_evicted_quota_trajectories", "evicted_quota", "Beyond a prompt's quota."),
        _counter("buffer_evicted_capacity_trajectories", "evicted_capacity", "Beyond capacity."),
        _counter("buffer_quarantined_trajectories", "quarantined", "Taken out: log q disagree."),
        _counter("buffer_accepted_groups", "groups_accepted", "Groups that actors have stored."),
        _counter("buffer_drawn_groups", "groups_drawn", "Draws of fresh groups."),
        _counter("buffer_expired_groups", "groups_expired", "Grew older than buffer.max_age."),
        _counter("buffer_dropped_groups", "groups_dropped", "Beyond the room for fresh groups."),
        _counter("buffer_exhausted_groups", "groups_exhausted", "Drawn as often as they may be."),
        _counter("buffer_quarantined_groups", "groups_quarantined", "Taken out by the gate."),
    ),
    Source.PART: (_counter("part_restarts", "restarts", "Times that a part was started again."),),
    Source.KIND: (
        _gauge("desired_parts", "desired", "Parts of a kind that the run wants."),
        _gauge("running_parts", "running", "Parts of a kind that run."),
    ),
}


class Telemetry:
    """Hands changed values to Ray. Cheap; only in a process that has joined a Ray cluster.

    Ray forgets a gauge that is not set for two of its report intervals (20 s unless
    RAY_metrics_report_interval_ms says otherwise), so parts that are gone show no old values.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics = {
            each.name: (Counter if each.is_counter else Gauge)(each.name, each.description, _TAGS)
            for group in INSTRUMENTS.values()
            for each in group
        }
        self._counted: dict[tuple[str, str, int], float] = {}

    def record_part(self, name: str, status: Mapping[str, float], *, incarnation: int) -> None:
        """Record what a part of the run says of itself; `incarnation` as for `record`."""
        self.record(Source(name.partition("-")[0]), status, part=name, incarnation=incarnation)
        self.record(Source.PART, {"restarts": incarnation}, part=name)

    def record_run(
        self,
        learner: Mapping[str, float],
        buffer: ReplayStats,
        counts: Mapping[str, Mapping[str, int]],
    ) -> None:
        """Record the learner's metrics, the buffer, and how many parts are desired and actual."""
        self.record(Source.LEARNER, learner, part="learner")
        self.record(Source.BUFFER, asdict(buffer) | asdict(buffer.counters), part="buffer")
        for kind, desired in counts["desired"].items():
            values = {"desired": desired, "running": counts["actual"][kind]}
            self.record(Source.KIND, values, part=kind)

    def record(
        self, source: Source, values: Mapping[str, float], *, part: str, incarnation: int = 0
    ) -> None:
        """Record those values of one part that have a metric; counters are totals since its start.

        Args:
            incarnation: how often it was started before; each time its counters began at zero.
        """
        tags = {"run": self._run, "part": part}
        for instrument in INSTRUMENTS[source]:
            if (value := values.get(instrument.key)) is None:
                continue
            metric, series = self._metrics[instrument.name], (instrument.name, part, incarnation)
            if not instrument.is_counter:
                metric.set(value, tags)
            elif value > (counted := self._counted.get(series, 0.0)):
                metric.inc(value - counted, tags)
                self._counted[series] = value
