"""The agreement gate between replay and learner: what a sampler recorded must be reproducible."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import msgpack
from torch import nn

from buffer.replay import BufferStarved, DrawRequest, Group, Replay
from buffer.trajectory import Trajectory
from learner.agreement.comparison import Comparison, Gap, Pair, compare, pair_of
from learner.agreement.policy_history import PastPolicies
from learner.agreement.quarantine import Quarantine
from learner.agreement.schedule import Schedule
from learner.agreement.tolerance import Disagreement, Tolerance, rounding_of
from learner.batch import members
from learner.config import LearnerConfig
from lm.actions import ActionSpace

Compared = dict[Trajectory, Comparison]


@dataclass(slots=True)
class _Counts:
    """What became of the sampled trajectories of one step; demonstrations are none.

    checked + vouched + unchecked = all of them. `quarantined` counts those, too, that were vouched
    for and found to be wrong after the step.
    """

    checked: int = 0  # compared
    vouched: int = 0  # not, but `Schedule.vouches` for them
    unchecked: int = 0  # neither
    quarantined: int = 0
    admitted_max_nats: float = 0.0  # largest root mean square of what was compared and let through
    seconds: float = 0.0


@dataclass(kw_only=True, eq=False)
class AgreementGate:
    """A `Replay` in front of another, without what disagrees with the learner's own log q.

    A trajectory of version v is recomputed with the adapter that was published as v. Of the first
    draws all are, so that the tolerance is learned from them; later, what `Schedule` chooses. Where
    one of these disagrees, so is everything of its actor in that draw.

    What disagrees by more than the tolerance goes into quarantine. An actor whose every completion
    is wrong from its first on is caught before anything of it is let through. One that has agreed
    before is caught after the first step that learns from it, where what it sampled under the
    weights of that step is wrong as the learner's own pass has it; sooner than it is due, where it
    differs more than it did; and with the next version that is due in any case, at most
    1 / `agreement_check_share` versions later. No more of what was found wrong is let through.

    A version that is not kept, being too old, cannot be recomputed: its trajectories count as
    unchecked and are let through, unless their actor has disagreed at just that version.

    Only rank 0 of the learner uses it. It leaves the model and the random numbers of the run as
    they were, bit for bit: while all agree, a run is the same with and without it.
    """

    replay: Replay  # where groups come from, and what is wrong is discarded
    model: nn.Module
    actions: ActionSpace
    past: PastPolicies  # the model's earlier adapters; filled by `keep`
    quarantine: Quarantine
    config: LearnerConfig
    warn: Callable[[str], None]  # takes a line when an actor disagrees at a version the first time
    _wrong: set[Pair] = field(default_factory=set, init=False)
    _counts: _Counts = field(default_factory=_Counts, init=False)

    def __post_init__(self) -> None:
        config = self.config
        # The model's own weights are what is published, unless that is rounded.
        self._publishes_itself = config.publish_dtype == "float32"
        self.tolerance = Tolerance(
            rounding_of(self.model), fixed_nats=config.agreement_tolerance_nats
        )
        self.schedule = Schedule(config.agreement_check_share)
        self._disagreement = Disagreement(
            max_share=config.agreement_max_share, tolerance=self.tolerance
        )

    def keep(self, version: int, adapter: bytes) -> None:
        """Remember the adapter that is published as `version`."""
        self.past.keep(version, adapter)
        self.schedule.keep(self.past)

    def draw(self, request: DrawRequest) -> list[Group]:
        """As the replay behind it, without what is quarantined; the model holds the version asked.

        A group of which nothing fresh is left is replaced by another.

        Raises:
            BufferStarved: too few groups, or too few that agree, in `timeout_s`.
            SamplersDisagree: too much of the last draws is wrong.
        """
        deadline_s = monotonic() + request.timeout_s
        self._counts = _Counts()
        admitted: list[Group] = []
        while missing := request.num_groups - len(admitted):
            left_s = deadline_s - monotonic()
            if left_s < 0 < self._counts.quarantined:
                raise BufferStarved(
                    f"{len(admitted)} of {request.num_groups} groups agree with the learner on "
                    f"log q after {request.timeout_s:.1f} s; {self._counts.quarantined} "
                    "trajectories were quarantined"
                )
            drawn = self.replay.draw(
                replace(request, num_groups=missing, timeout_s=max(left_s, 0.0))
            )
            if not drawn:
                return []
            started_s = monotonic()
            known = len(self._wrong)
            agreed = self._admit(drawn, request.version)
            if admitted and len(self._wrong) > known:  # some of it may be of who was vouched for
                admitted = self._admit(admitted, request.version)
            admitted += agreed
            self._counts.seconds += monotonic() - started_s
        return admitted

    def hear(self, groups: Sequence[Group], gaps: Mapping[Pair, Gap], version: int) -> None:
        """Take in what a step says of the groups that it learned from.

        Args:
            gaps: from the learner's own log q, under `version`, which it has left since.
        """
        started_s = monotonic()
        doubted = {
            pair
            for pair, gap in gaps.items()
            if pair[1] == version and self._publishes_itself and not self.tolerance.admits(gap)
        }
        if doubted:
            rows = [t for t in _sampled(members(groups)) if pair_of(t) in doubted]
            if wrong := self._judge(self._compare(rows, version + 1)):
                self._disagreement.note(0, list(wrong.values()))
                self._counts.quarantined += len(wrong)
                self._shut_away(wrong)
                self.replay.discard([t for g in groups for t in g.replayed if t in wrong])
        self.schedule.hear(gaps, version)
        self._counts.seconds += monotonic() - started_s

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        self.replay.discard(trajectories)

    def save(self) -> bytes:
        """Adapters, who agreed or was wrong at which version, and what rounding was seen.

        Not the share of what was wrong lately: that is counted anew.
        """
        agreed, *records = self.schedule.save()
        known = [agreed, sorted(self._wrong), *records]
        data: bytes = msgpack.packb([self.past.save(), known, self.tolerance.save()])
        return data

    def restore(self, data: bytes) -> None:
        """Know what was known at the moment of `save`."""
        adapters, (agreed, wrong, *records), *tolerance = msgpack.unpackb(
            data, strict_map_key=False, use_list=False
        )
        for version, adapter in adapters.items():
            self.past.keep(version, adapter)
        self.schedule.restore(agreed, *records)
        self._wrong = set(wrong)
        for learned in tolerance:  # checkpoints of before it was learned have none
            self.tolerance.restore(learned)

    def metrics(self) -> dict[str, float]:
        counts = self._counts
        names = ["checked", "vouched", "unchecked", "quarantined"]
        if counts.checked > counts.quarantined:
            names.append("admitted_max_nats")
        metrics = {f"agreement/{name}": float(getattr(counts, name)) for name in names}
        return metrics | {"time/agreement_s": counts.seconds}

    def _admit(self, drawn: Sequence[Group], version: int) -> list[Group]:
        """The groups without what is wrong, and without those of which nothing fresh is left."""
        fresh = _sampled(t for group in drawn for t in group.fresh)
        replayed = _sampled(t for group in drawn for t in group.replayed)
        groups = list(drawn)
        if wrong := self._find_wrong(fresh, replayed, version):
            evidence = self._shut_away(wrong)
            self.replay.discard([t for t in replayed if t in wrong])
            self._disagreement.check(evidence)
            groups = [
                replace(
                    group,
                    fresh=tuple(t for t in group.fresh if t not in wrong),
                    replayed=tuple(t for t in group.replayed if t not in wrong),
                )
                for group in drawn
            ]
        return [group for group in groups if group.fresh]

    def _find_wrong(
        self, fresh: Sequence[Trajectory], replayed: Sequence[Trajectory], version: int
    ) -> Compared:
        sampled = [*fresh, *replayed]
        if self.tolerance.calibrating:
            compared = self._compare(sampled, version)
            self.tolerance.calibrate(compared.values())
        else:
            chosen = self.schedule.choose(fresh, replayed, wrong=self._wrong, version=version)
            compared = self._compare(chosen, version)
        suspects = {
            t.actor for t, outcome in compared.items() if not self.tolerance.admits(outcome)
        }
        rest = [t for t in sampled if t.actor in suspects and t not in compared]
        compared |= self._compare(rest, version)
        wrong = self._judge(compared)
        wrong_pairs = self._wrong | {pair_of(t) for t in wrong}
        lost = [t for t in sampled if t not in compared and pair_of(t) in wrong_pairs]
        wrong |= {t: Comparison(trajectory=t, learner_version=version) for t in lost}
        self._count(sampled, compared, wrong)
        return wrong

    def _judge(self, compared: Compared) -> Compared:
        """Those that are wrong; the schedule learns of all."""
        wrong = {
            t: outcome for t, outcome in compared.items() if not self.tolerance.admits(outcome)
        }
        pairs = {pair_of(t) for t in wrong}
        self.schedule.note({pair_of(t) for t in compared} - pairs - self._wrong, pairs)
        return wrong

    def _compare(self, trajectories: Sequence[Trajectory], version: int) -> Compared:
        """A comparison for each whose version the model holds or held."""
        by_version: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_version.setdefault(trajectory.policy_version, []).append(trajectory)
        compared: Compared = {}
        for sampled_at, same in by_version.items():
            own = sampled_at == version and self._publishes_itself
            if not own and sampled_at not in self.past:
                continue
            with nullcontext() if own else self.past.as_of(sampled_at):
                outcomes = compare(
                    self.model,
                    self.actions,
                    same,
                    learner_version=version,
                    token_budget=self.config.token_budget,
                )
            compared |= zip(same, outcomes, strict=True)
        return compared

    def _count(self, sampled: Sequence[Trajectory], compared: Compared, wrong: Compared) -> None:
        others = [t for t in sampled if t not in compared]
        vouched = sum(
            number
            for pair, number in Counter(map(pair_of, others)).items()
            if pair[1] in self.past and self.schedule.vouches(pair)
        )
        admitted = [outcome.rms_nats for t, outcome in compared.items() if t not in wrong]
        counts = self._counts
        counts.checked += len(compared)
        counts.vouched += vouched
        counts.unchecked += len(others) - vouched
        counts.quarantined += len(wrong)
        counts.admitted_max_nats = max([counts.admitted_max_nats, *admitted])
        judged = len(compared) + vouched + len(wrong.keys() - compared.keys())
        self._disagreement.note(judged, list(wrong.values()))

    def _shut_away(self, wrong: Compared) -> Path:
        """Write what is wrong to disk and warn of whom it is news; the file."""
        evidence = self.quarantine.keep(list(wrong.values()))
        by_pair: dict[Pair, list[Comparison]] = {}
        for trajectory, outcome in wrong.items():
            by_pair.setdefault(pair_of(trajectory), []).append(outcome)
        for pair in [pair for pair in by_pair if pair not in self._wrong]:
            self._wrong.add(pair)
            self.warn(
                f"{len(by_pair[pair])} trajectories quarantined: log q of "
                f"{self._disagreement.describe(by_pair[pair])}; kept in {evidence}"
            )
        return evidence


def _sampled(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Without demonstrations, which no policy sampled."""
    return [t for t in trajectories if t.behaviour != "demonstration"]
