"""Starts every part of a distributed run, replaces what dies, scales it, and stops all in order.

The driver calls `tick` again and again, between showing progress and looking for a request to stop.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from buffer.stats import ReplayStats
from cluster.config.schema import RunConfig
from cluster.distributed.clients import RemoteBoard
from cluster.distributed.ending import end_in_order
from cluster.distributed.launcher import Launch, Launcher
from cluster.distributed.learner_reports import LearnerReports
from cluster.distributed.leaving import Leaving
from cluster.distributed.nodes import living_nodes, may_grow, room
from cluster.distributed.roster import Roster
from cluster.distributed.telemetry import Telemetry
from cluster.distributed.worker import RunContext
from cluster.distributed.worker_group import Gang, Phase, StartFailed
from cluster.run.resources import check_fit
from cluster.run.scale_request import ScaleRefused

_TICK_S = 0.2
_PATIENCE_S = 5.0  # a place that there is room for is had within a moment
_PREFIXES = {"actors": "actor-", "replicas": "reward-"}


class RunFailed(RuntimeError):
    """A part of the run died more often than it may be replaced."""


class Supervisor:
    """Owns the gangs of a run.

    Args:
        report: takes one line for people each time something happens.
    """

    def __init__(
        self,
        config: RunConfig,
        launcher: Launcher,
        context: RunContext,
        report: Callable[[str], None],
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._context = context
        self._report = report
        board = RemoteBoard(context.board, timeout_s=config.cluster.answer_timeout_s)
        self._roster = Roster(board)
        self._telemetry = Telemetry(context.run)
        self._incarnations: dict[str, int] = {}  # names and seeds are never used twice
        self._deaths: dict[str, int] = {}
        self._added: set[str] = set()  # by `scale`, and did not run yet
        self._leaving: list[Leaving] = []
        self._retired: list[dict[str, Any]] = []  # last counters of actors that died or left
        self.given_up = ""
        self._reports = LearnerReports(report, timeout_s=config.cluster.answer_timeout_s)
        self.learner_rows = self._reports.rows
        self._waited: list[Gang] = []  # for a place, and people have been told
        self.gangs: dict[str, Gang] = {}
        for index in range(config.reward_replicas):
            self._launch_replica(index)
        self._launch_learner()
        for index in range(config.rollout_actors):
            self._launch_actor(index)

    @property
    def running(self) -> bool:
        """Whether every part has come up."""
        return all(gang.phase is Phase.RUNNING for gang in self.gangs.values())

    @property
    def settled(self) -> bool:
        """Whether all parts that are wanted run, and none is leaving any more."""
        return self.running and not self._leaving

    @property
    def finished(self) -> bool:
        """Whether the learner has done its steps."""
        return self.gangs["learner"].phase is Phase.FINISHED

    @property
    def learner_status(self) -> dict[str, Any]:
        """Step and version of the learner, as last heard."""
        return self.gangs["learner"].status

    def tick(self) -> None:
        """Look at every gang once, replace the dead, pass on what changed; then rest a little.

        The rest is what keeps the driver from taking a core that the workers need.

        Raises:
            StartFailed: a part that never ran could not start.
            RunFailed: a part died more than `cluster.max_restarts` times.
            Unrecoverable: a part failed in a way that its replacement would only repeat.
        """
        for name, gang in list(self.gangs.items()):
            before = gang.phase
            after = gang.poll()
            if after is Phase.RUNNING and before is not Phase.RUNNING:
                self._added.discard(name)
                self._report(f"{name} is up")
            if after is Phase.FAILED:
                self._clear_up(name, gang, ever_ran=before is Phase.RUNNING)
        self._see_off()
        self._tell_who_waits()
        self._announce()
        self._reports.collect(self.gangs["learner"])
        time.sleep(_TICK_S)

    def scale(self, *, actors: int | None = None, replicas: int | None = None) -> None:
        """Have these numbers from now on; None leaves one as it is. Nothing else is touched.

        New parts start as the first ones did, and one that does not come up is given up. Those
        that do not run leave first, then those with the highest numbers, withdrawn from the board
        before. The first actor always stays: it seeds the buffer.

        Raises:
            ScaleRefused: the run has no parts of that kind.
            DoesNotFit: there is no room, and no autoscaler that could make some.
        """
        asked = {"actors": actors, "replicas": replicas}
        for kind, number in asked.items():
            if number is not None and not self._names(kind):
                raise ScaleRefused(f"this run has no {kind}: its objective or task asks for none")
        wanted = {
            kind: len(self._names(kind)) if number is None else number
            for kind, number in asked.items()
        }
        if not may_grow():
            check_fit(self._config.with_parts(**wanted), living_nodes())
        self.given_up = ""
        gone = [name for kind in wanted for name in self._by_worth(kind)[wanted[kind] :]]
        self._announce(without=gone)  # where the board fails, all are still the run's to stop
        gangs = [self.gangs.pop(name) for name in gone]
        self._added.difference_update(gone)
        timeout_s = self._config.cluster.stop_timeout_s
        self._leaving.extend(Leaving(gang, timeout_s=timeout_s) for gang in gangs)
        for kind, number in wanted.items():
            for _ in range(number - len(self._names(kind))):
                self._add(kind)

    def counts(self) -> dict[str, dict[str, int]]:
        """Desired and running numbers of actors and reward replicas; those that leave still run."""
        return {
            "desired": {kind: len(self._names(kind)) for kind in _PREFIXES},
            "actual": {kind: self._running(prefix) for kind, prefix in _PREFIXES.items()},
        }

    def actor_totals(self) -> dict[str, float]:
        """Counters over all actors, those that died or left included; times in seconds."""
        totals: dict[str, float] = {}
        living = [gang.status for gang in self._parts("actor-")]
        for status in [*living, *self._retired]:
            for key, value in status.items():
                totals[key] = totals.get(key, 0.0) + value
        totals.pop("version", None)
        return totals

    def tell(self, learner: Mapping[str, float], buffer: ReplayStats) -> None:
        """Hand metrics of every part to Ray."""
        for gang in reversed(self._parts()):  # whoever has the name of one that leaves comes last
            self._tell_of(gang)
        self._telemetry.tell_run(learner, buffer, self.counts())

    def stop(self, timeout_s: float) -> list[str]:
        """Have every part end in order: see `end_in_order`.

        Returns the names of the parts that did not end by themselves and were killed.
        """
        parts = self._parts()
        killed = end_in_order(
            parts,
            timeout_s=timeout_s,
            report=self._report,
            watch=lambda: self._announce(wait=False),
        )
        self._reports.collect(self.gangs["learner"])
        for gang in parts:
            gang.kill()
        return killed

    def _tell_who_waits(self) -> None:
        """Say once of each gang that it has waited for a place, and what there is."""
        waiting = [
            gang
            for gang in self.gangs.values()
            if gang.phase is Phase.PLACING
            and gang.phase_s > _PATIENCE_S
            and gang not in self._waited
        ]
        if waiting:
            self._waited.extend(waiting)
            self._report(
                f"waiting up to {self._config.cluster.start_timeout_s:.0f} s for a place for "
                f"{', '.join(gang.wanted for gang in waiting)}: {room()}"
            )

    def _parts(self, prefix: str = "") -> list[Gang]:
        """Gangs of one kind or of all, those that leave included."""
        gangs = [*self.gangs.values(), *(leaving.gang for leaving in self._leaving)]
        return [gang for gang in gangs if gang.name.startswith(prefix)]

    def _running(self, prefix: str) -> int:
        return sum(gang.phase is Phase.RUNNING for gang in self._parts(prefix))

    def _names(self, kind: str) -> list[str]:
        """Of the gangs that the run wants, by number."""
        prefix = _PREFIXES[kind]
        names = [name for name in self.gangs if name.startswith(prefix)]
        return sorted(names, key=lambda name: int(name.removeprefix(prefix)))

    def _by_worth(self, kind: str) -> list[str]:
        """Of the gangs that the run wants, those that it could do without last."""

        def key(name: str) -> tuple[bool, bool]:
            return name != "actor-0", self.gangs[name].phase is not Phase.RUNNING

        return sorted(self._names(kind), key=key)

    def _add(self, kind: str) -> None:
        """Launch one more, under the lowest number that is free."""
        prefix = _PREFIXES[kind]
        index = next(i for i in itertools.count() if f"{prefix}{i}" not in self.gangs)
        self._deaths.pop(f"{prefix}{index}", None)
        self._added.add(f"{prefix}{index}")
        if kind == "actors":
            self._launch_actor(index)
        else:
            self._launch_replica(index)

    def _clear_up(self, name: str, gang: Gang, *, ever_ran: bool) -> None:
        """Let a part that failed say its last words, end what is left of it, and go on."""
        if name == "learner":
            self._reports.collect(gang)
        gang.kill()
        if name in self._added:
            self._give_up(name, gang)
        else:
            self._replace(name, gang, ever_ran=ever_ran)

    def _give_up(self, name: str, gang: Gang) -> None:
        """Do without a part that was added and did not come up; the run goes on as it was."""
        self._added.discard(name)
        del self.gangs[name]
        text = f"{gang.cause}; given up"
        self.given_up = f"{self.given_up}; {text}" if self.given_up else text
        self._report(text)

    def _see_off(self) -> None:
        """Let go of those that have left, and keep what they counted."""
        for leaving in list(self._leaving):
            if (end := leaving.poll()) is not None:
                self._leaving.remove(leaving)
                self._retire(leaving.gang)
                self._report(end)

    def _retire(self, gang: Gang) -> None:
        """Keep what a part that is gone has counted, and tell it: nobody asks for it again."""
        self._tell_of(gang)
        if gang.name.startswith("actor-"):
            self._retired.append(gang.status)

    def _tell_of(self, gang: Gang) -> None:
        self._telemetry.tell_part(gang.name, gang.status, life=gang.incarnation)

    def _replace(self, name: str, gang: Gang, *, ever_ran: bool) -> None:
        if gang.fatal is not None:
            raise gang.fatal
        deaths = self._deaths[name] = self._deaths.get(name, 0) + 1
        if not ever_ran and deaths == 1:
            raise StartFailed(f"could not start {gang.cause}")
        self._report(f"{gang.cause}; replacing it")
        if deaths > self._config.cluster.max_restarts:
            raise RunFailed(
                f"{name} died {deaths} times "
                f"(cluster.max_restarts = {self._config.cluster.max_restarts}); last: {gang.cause}"
            )
        self._retire(gang)
        kind, _, index = name.partition("-")
        if kind == "actor":
            self._launch_actor(int(index))
        elif kind == "reward":
            self._launch_replica(int(index))
        else:
            self._launch_learner()

    def _launch_actor(self, index: int) -> None:
        incarnation = self._next_incarnation(name := f"actor-{index}")
        launch = self._launcher.rollout_actor(self._context, index=index, incarnation=incarnation)
        self._launch(name, launch, incarnation)

    def _launch_replica(self, index: int) -> None:
        incarnation = self._next_incarnation(name := f"reward-{index}")
        launch = self._launcher.reward_replica(self._context, index=index, incarnation=incarnation)
        self._launch(name, launch, incarnation)

    def _launch_learner(self) -> None:
        incarnation = self._next_incarnation("learner")
        self._reports.begin()
        launch = self._launcher.learner(self._context, incarnation=incarnation)
        self._launch("learner", launch, incarnation)

    def _next_incarnation(self, name: str) -> int:
        self._incarnations[name] = self._incarnations.get(name, -1) + 1
        return self._incarnations[name]

    def _launch(self, name: str, launch: Launch, incarnation: int) -> None:
        self.gangs[name] = Gang(
            name,
            launch,
            incarnation=incarnation,
            start_timeout_s=self._config.cluster.start_timeout_s,
            silence_timeout_s=self._config.cluster.silence_timeout_s,
        )

    def _announce(self, *, without: Sequence[str] = (), wait: bool = True) -> None:
        names = tuple(
            f"{name}.{gang.incarnation}"
            for name, gang in self.gangs.items()
            if name.startswith("reward-") and gang.phase is Phase.RUNNING and name not in without
        )
        self._roster.tell(names, wait=wait)
