"""Which trajectories are compared: few of actors that agreed so far, and soon those that changed.

A comparison is a forward pass for a row that shares its prompt with nobody. An actor that agrees is
compared again 1, 2, 4, 8 .. versions later, at most 1 / share; in between its record vouches for
it. Nobody is unheard in between: the learner computes log q of all that it learns from, under its
own weights. Of what those weights sampled, that is the comparison. Of older versions it differs by
what the policy has moved since, and an actor that suddenly differs more is compared at once. Damage
that grows slowly, or stays below what the policy moves, is found with the next comparison.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from buffer.trajectory import Trajectory
from learner.agreement.comparison import Gap, Pair, num_decisions, pair_of

# Of what is heard of an actor to the most that was heard of any lately, above which it is compared.
_GROWTH = 1.5
# What of that is left with every step: in 14 steps half.
_DECAY = 0.95
# What one hearing may add to it, as a factor: a single row may be off by any number of nats.
_LEAP = 4.0
# Versions behind its newest that are heard of an actor: of what is replayed only the policy's way
# since is heard, which differs from row to row.
_RECENT = 4


@dataclass(slots=True)
class _Record:
    """Of an actor whose last comparison agreed."""

    since: int  # the version with which agreement began
    last: int  # the last version that was compared
    gap: int = 1  # versions to the next comparison
    newest: int = 0  # the newest version that was heard
    doubted: int | None = None  # the newest version at which it was heard to differ more by now
    heard: float = 0.0  # ... how much, nats

    @property
    def due(self) -> int:
        """The first version that it does not vouch for; of all actors the same, where it can be,
        since comparisons of one version share the change of weights."""
        doubted = self.doubted is not None
        return self.last + 1 if doubted else (self.last // self.gap + 1) * self.gap


class Schedule:
    """Says what to compare; is told what came of it and what the learner's own pass has shown.

    Args:
        share: of an actor's versions, and of the draw in which one is compared; 1: everything.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._agreed: set[Pair] = set()  # compared themselves
        self._records: dict[str, _Record] = {}
        # The most that one step seemed to move the policy lately, as rows of any actor have it that
        # nobody doubts, nats; 0: nothing heard yet.
        self._moved = 0.0

    def vouches(self, pair: Pair) -> bool:
        """Whether this actor agreed at this version, or has a record that reaches so far."""
        actor, version = pair
        record = self._records.get(actor)
        return pair in self._agreed or (record is not None and record.since <= version < record.due)

    def alarmed(self, actor: str) -> bool:
        """Whether this actor is heard to differ more than any did lately."""
        record = self._records.get(actor)
        return record is not None and record.doubted is not None

    def choose(
        self,
        fresh: Sequence[Trajectory],
        replayed: Sequence[Trajectory],
        *,
        wrong: Set[Pair],
        version: int,
    ) -> list[Trajectory]:
        """What of a draw to compare, before anything is known of it.

        - Of every actor and version that nothing vouches for, the one with the most decisions. Of
          an actor that is heard to differ more: of that version, and of its newest, which is of
          after any damage that was heard; of no others, where it has a newer one.
        - Everything of those that have ever been `wrong`.
        - Of the others of these versions, whose weights are in place by then, as many as bring it
          to about the share.
        """
        sampled = [*fresh, *replayed]
        if self._share == 1:
            return sampled
        probes = self._probes(replayed) | self._probes(fresh)
        newest_of = _newest(pair_of(t) for t in fresh if t.policy_version <= version)
        for actor, newest in newest_of.items():
            if self.alarmed(actor) and newest > (doubted := self._records[actor].doubted or 0):
                telling = {newest, doubted}
                probes = {p: t for p, t in probes.items() if p[0] != actor or p[1] in telling}
        chosen = dict.fromkeys(probes.values())
        chosen |= dict.fromkeys(t for t in sampled if wrong and pair_of(t) in wrong)
        if not chosen:
            return []
        versions = {t.policy_version for t in chosen}
        rest = [t for t in sampled if t.policy_version in versions and t not in chosen]
        # The version is the seed, so that a resumed run chooses as the uninterrupted one.
        lots = np.random.default_rng(version).random(len(rest))
        share = (self._share * len(sampled) - len(chosen)) / max(len(rest), 1)
        return [*chosen, *(t for t, lot in zip(rest, lots, strict=True) if lot < share)]

    def note(self, agreed: Iterable[Pair], wrong: Set[Pair]) -> None:
        """Learn what comparisons have said: who `agreed`, and of whom something was `wrong`."""
        liars = {actor for actor, _ in wrong}
        for actor in liars:
            self._records.pop(actor, None)
        honest = sorted(pair for pair in agreed if pair[0] not in liars)
        newest = dict(honest)
        for actor, version in newest.items():
            record = self._records.setdefault(actor, _Record(since=version, last=version))
            # A doubt ends with what is newer than all that raised it.
            if version >= record.due and (record.doubted is None or version > record.doubted):
                self._moved = max(self._moved, record.heard)  # so much is usual
                record.last, record.doubted, record.heard = version, None, 0.0
                longest = round(1 / self._share) if self._share else 2 * record.gap
                record.gap = min(2 * record.gap, longest)
        # At which of its versions an actor broke, nobody knows.
        self._agreed = {pair for pair in self._agreed if pair[0] not in liars} | set(honest)

    def hear(self, gaps: Mapping[Pair, Gap], version: int) -> None:
        """Bring forward who differs more from the learner, of `version`, than any did lately."""
        usual, most = self._moved, 0.0
        for actor, newest in _newest(gaps).items():
            record = self._records.get(actor)
            if record is None:
                continue
            record.newest = max(record.newest, min(newest, version))
            recent = {
                sampled_at: gap
                for (name, sampled_at), gap in gaps.items()
                if name == actor and record.newest - _RECENT <= sampled_at < version
            }
            if not recent:
                continue
            # Steps go different ways: the square grows as their number does.
            squares = sum(g.rms_nats**2 * g.decisions / (version - at) for at, g in recent.items())
            heard = math.sqrt(squares / sum(gap.decisions for gap in recent.values()))
            if heard <= _GROWTH * (usual or heard):  # never true of NaN
                most = max(most, heard)
                continue
            record.doubted = max(record.doubted or 0, *recent)
            record.heard = min(max(record.heard, heard), _LEAP * usual)  # NaN changes nothing
            # It may have broken within a version that agreed: what was heard is due.
            record.last = min(record.last, min(recent) - 1)
            self._agreed = {pair for pair in self._agreed if pair[0] != actor}
        self._moved = max(most, _DECAY * usual) if most else usual

    def _probes(self, trajectories: Sequence[Trajectory]) -> dict[Pair, Trajectory]:
        """Of each actor and version that nothing vouches for, the one with the most decisions."""
        pairs = set(map(pair_of, trajectories))
        if not (unknown := {pair for pair in pairs if not self.vouches(pair)}):
            return {}
        telling = [t for t in trajectories if pair_of(t) in unknown]
        return {pair_of(t): t for t in sorted(telling, key=num_decisions)}

    def keep(self, versions: Container[int]) -> None:
        """Forget who agreed at others, which cannot be compared any more."""
        self._agreed = {pair for pair in self._agreed if pair[1] in versions}

    def save(self) -> list[Any]:
        records = {name: asdict(each) for name, each in self._records.items()}
        return [sorted(self._agreed), records, self._moved]

    def restore(
        self,
        agreed: Iterable[Pair],
        records: Mapping[str, Any] | None = None,
        moved: float = 0.0,
    ) -> None:
        """Know what was known at the moment of `save`; earlier checkpoints have no records, or
        such as do not say which version was heard to differ: those actors begin anew."""
        self._agreed, self._moved = set(agreed), moved
        self._records = {
            name: _Record(**each) for name, each in (records or {}).items() if "doubted" in each
        }


def _newest(pairs: Iterable[Pair]) -> dict[str, int]:
    """The newest version of each actor."""
    return dict(sorted(pairs))
