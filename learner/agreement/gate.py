"""The agreement gate between replay and learner: what a sampler recorded must be reproducible."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import msgpack
import numpy as np
from torch import nn

from buffer.replay import BufferStarved, DrawRequest, Group, Replay
from buffer.trajectory import Trajectory
from learner.agreement.comparison import Comparison, compare, num_decisions
from learner.agreement.policy_history import PastPolicies
from learner.agreement.quarantine import Quarantine
from learner.agreement.tolerance import Disagreement, Tolerance, rounding_of
from learner.config import LearnerConfig
from lm.actions import ActionSpace

Pair = tuple[str, int]  # an actor, and the policy version that it claims
Compared = dict[Trajectory, Comparison]


@dataclass(slots=True)
class _Counts:
    """What became of the sampled trajectories of one step; demonstrations are none.

    checked + vouched + unchecked = all of them.
    """

    checked: int = 0  # compared
    vouched: int = 0  # not, but another of the same actor and version agreed
    unchecked: int = 0  # neither
    quarantined: int = 0
    admitted_max_nats: float = 0.0  # largest root mean square of what was compared and let through
    seconds: float = 0.0


@dataclass(kw_only=True, eq=False)
class AgreementGate:
    """A `Replay` in front of another, without what disagrees with the learner's own log q.

    A trajectory of version v is recomputed with the adapter that was published as v. All of them
    would cost one more forward pass of everything. In the first draws they all are, so that the
    tolerance is learned from them; in each later draw these are compared:

    - of every actor and version among the fresh trajectories, the one with the most decisions;
      likewise of those that only replay brings, unless an earlier comparison vouches for them;
    - everything of an actor of which one of these disagrees;
    - everything of an actor and version that have ever disagreed;
    - of the others of these versions, whose weights are in place by then, as many as bring what is
      compared to about `agreement_check_share` of the draw.

    What disagrees by more than the tolerance goes into quarantine. An actor whose every completion
    is wrong is caught at the first group of it that is drawn, before anything of it is let through;
    damage that shows in few completions, when one of them is compared.

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
    _agreed: set[Pair] = field(default_factory=set, init=False)
    _wrong: set[Pair] = field(default_factory=set, init=False)
    _counts: _Counts = field(default_factory=_Counts, init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.tolerance = Tolerance(
            rounding_of(self.model), fixed_nats=config.agreement_tolerance_nats
        )
        self._disagreement = Disagreement(
            max_share=config.agreement_max_share, tolerance=self.tolerance
        )

    def keep(self, version: int, adapter: bytes) -> None:
        """Remember the adapter that is published as `version`."""
        self.past.keep(version, adapter)
        self._agreed = {pair for pair in self._agreed if pair[1] in self.past}

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
            admitted += self._admit(drawn, request.version)
            self._counts.seconds += monotonic() - started_s
        return admitted

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        self.replay.discard(trajectories)

    def save(self) -> bytes:
        """Adapters, who agreed or was wrong at which version, and what rounding was seen.

        Not the share of what was wrong lately: that is counted anew.
        """
        known = [sorted(self._agreed), sorted(self._wrong)]
        data: bytes = msgpack.packb([self.past.save(), known, self.tolerance.save()])
        return data

    def restore(self, data: bytes) -> None:
        """Know what was known at the moment of `save`."""
        adapters, (agreed, wrong), *tolerance = msgpack.unpackb(
            data, strict_map_key=False, use_list=False
        )
        for version, adapter in adapters.items():
            self.past.keep(version, adapter)
        self._agreed, self._wrong = set(agreed), set(wrong)
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
        wrong = self._find_wrong(fresh, replayed, version)
        if wrong:
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
            compared = self._compare(self._choose(fresh, replayed, version), version)
        suspects = {
            t.actor for t, outcome in compared.items() if not self.tolerance.admits(outcome)
        }
        rest = [t for t in sampled if t.actor in suspects and t not in compared]
        compared |= self._compare(rest, version)
        wrong = {
            t: outcome for t, outcome in compared.items() if not self.tolerance.admits(outcome)
        }
        wrong_pairs = self._wrong | {_pair(t) for t in wrong}
        lost = [t for t in sampled if t not in compared and _pair(t) in wrong_pairs]
        wrong |= {t: Comparison(trajectory=t, learner_version=version) for t in lost}
        self._agreed |= {_pair(t) for t in compared}
        self._agreed -= wrong_pairs
        self._count(sampled, compared, wrong)
        return wrong

    def _choose(
        self, fresh: Sequence[Trajectory], replayed: Sequence[Trajectory], version: int
    ) -> list[Trajectory]:
        """What to compare before anything is known of this draw."""
        sampled = (*fresh, *replayed)
        probes = _most_telling(fresh)
        strangers = [t for t in replayed if _pair(t) not in probes.keys() | self._agreed]
        chosen = dict.fromkeys([*probes.values(), *_most_telling(strangers).values()])
        chosen |= dict.fromkeys(t for t in sampled if _pair(t) in self._wrong)
        versions = {t.policy_version for t in chosen}
        rest = [t for t in sampled if t.policy_version in versions and t not in chosen]
        # The version is the seed, so that a resumed run chooses as the uninterrupted one.
        lots = np.random.default_rng(version).random(len(rest))
        wanted = self.config.agreement_check_share * len(sampled) - len(chosen)
        share = wanted / max(len(rest), 1)
        return [*chosen, *(t for t, lot in zip(rest, lots, strict=True) if lot < share)]

    def _compare(self, trajectories: Sequence[Trajectory], version: int) -> Compared:
        """A comparison for each whose version the model holds or held."""
        by_version: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_version.setdefault(trajectory.policy_version, []).append(trajectory)
        compared: Compared = {}
        for sampled_at, same in by_version.items():
            # The model's own weights are what was published, unless that was rounded.
            own = sampled_at == version and self.config.publish_dtype == "float32"
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
        vouched = sum(_pair(t) in self._agreed for t in others)
        admitted = [outcome.rms_nats for t, outcome in compared.items() if t not in wrong]
        counts = self._counts
        counts.checked += len(compared)
        counts.vouched += vouched
        counts.unchecked += len(others) - vouched
        counts.quarantined += len(wrong)
        counts.admitted_max_nats = max([counts.admitted_max_nats, *admitted])
        judged = len(compared) + vouched + sum(t in wrong for t in others)
        self._disagreement.note(judged, list(wrong.values()))

    def _shut_away(self, wrong: Compared) -> Path:
        """Write what is wrong to disk and warn of whom it is news; the file."""
        evidence = self.quarantine.keep(list(wrong.values()))
        by_pair: dict[Pair, list[Comparison]] = {}
        for trajectory, outcome in wrong.items():
            by_pair.setdefault(_pair(trajectory), []).append(outcome)
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


def _pair(trajectory: Trajectory) -> Pair:
    return trajectory.actor, trajectory.policy_version


def _most_telling(trajectories: Sequence[Trajectory]) -> dict[Pair, Trajectory]:
    """Of each actor and version, the trajectory with the most decisions to compare."""
    return {_pair(t): t for t in sorted(trajectories, key=num_decisions)}
