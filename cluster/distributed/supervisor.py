"""Starts every part of a distributed run, replaces what dies, scales it, and stops all in order.

The driver calls `tick` again and again, between showing progress and looking for a request to stop.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buffer.stats import ReplayStats
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.distributed.clients import RemoteRegistry
from cluster.distributed.launcher import Launcher
from cluster.distributed.ray_cluster import living_nodes, may_grow, room
from cluster.distributed.services import ServiceWatch
from cluster.distributed.shutdown import end_in_order
from cluster.distributed.telemetry import Telemetry
from cluster.distributed.waiting import PeerDied, PeerTimeout
from cluster.distributed.worker import RunContext
from cluster.distributed.worker_group import Phase, StartFailed, WorkerGroup
from cluster.run.resources import check_fit
from learner.broadcast import Unrecoverable
from reward.verifiers import CheckFailed, UnusableCheck

_TICK_S = 0.2
_PLACEMENT_NOTICE_S = 5.0  # Ray grants a placement within a moment if there is room for it
_LAST_WORDS_S = 5.0  # for a process whose work has failed to answer all the same
_PREFIXES = {"actors": "actor-", "replicas": "reward-"}
_KEYS = {"actors": "cluster.actors", "replicas": "reward.replicas"}


class RunFailed(RuntimeError):
    """A part of the run died more often than it may be replaced."""


@dataclass(eq=False)
class Supervisor:
    """Owns the worker groups of a run, and reports in lines for people what happens to them."""

    config: RunConfig
    launcher: Launcher
    context: RunContext
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        config, context, cluster = self.config, self.context, self.config.cluster
        self._registry = RemoteRegistry(
            context.replica_registry, timeout_s=cluster.answer_timeout_s
        )
        waits = {"timeout_s": cluster.silence_timeout_s, "start_timeout_s": cluster.start_timeout_s}
        self._watches = [
            ServiceWatch("weight store", context.weight_store, **waits),
            ServiceWatch("replica registry", context.replica_registry, **waits),
        ]
        self._telemetry = Telemetry(context.directory.name)
        self._launches: Counter[str] = Counter()  # names and seeds are never used twice
        self._deaths: Counter[str] = Counter()
        self._added: set[str] = set()  # by `scale`, and did not run yet
        self._leaving: list[tuple[WorkerGroup, float]] = []  # with their deadlines
        self._retired: list[dict[str, Any]] = []  # last counters of actors that died or left
        self._waited: list[WorkerGroup] = []  # for a placement, and it was reported
        self.given_up = ""
        self.over = False  # every part has given its place up
        self.learner_rows: list[dict[str, float]] = []
        self.groups: dict[str, WorkerGroup] = {}
        replicas = [f"reward-{index}" for index in range(config.reward_replicas)]
        actors = [f"actor-{index}" for index in range(config.rollout_actors)]
        for name in (*replicas, "learner", *actors):
            self._launch(name)

    @property
    def running(self) -> bool:
        return all(group.phase is Phase.RUNNING for group in self.groups.values())

    @property
    def settled(self) -> bool:
        """Whether all parts that are wanted run, and none is leaving any more."""
        return self.running and not self._leaving

    @property
    def finished(self) -> bool:
        return self.groups["learner"].phase is Phase.FINISHED

    @property
    def learner_status(self) -> dict[str, Any]:
        return self.groups["learner"].status

    def tick(self) -> None:
        """Look at every group once, replace the dead, pass on what changed; then rest a little.

        Raises:
            StartFailed: a part that never ran could not start.
            RunFailed: a part died more than `cluster.max_restarts` times.
            Unrecoverable, CheckFailed, UnusableCheck: a part failed in a way that its replacement
                would only repeat.
        """
        for name, group in list(self.groups.items()):
            before = group.phase
            after = group.poll()
            if after is Phase.RUNNING and before is not Phase.RUNNING:
                self._added.discard(name)
                self.report(f"{name} is up")
            if after is Phase.FAILED:
                self._clear_up(name, group, ever_ran=before is Phase.RUNNING)
        for watch in self._watches:
            if event := watch.poll():
                self.report(event)
        self._let_go()
        self._report_waiting()
        self._announce(wait=False)
        self._collect_reports()
        time.sleep(_TICK_S)  # else the driver takes a core that the workers need

    def scale(self, *, actors: int | None = None, replicas: int | None = None) -> None:
        """Have these numbers from now on; None leaves one as it is. Nothing else is touched.

        New parts start as the first ones did, and one that does not come up is given up. Those
        that do not run leave first, then those with the highest numbers, withdrawn from the
        registry before. The first actor always stays: it seeds the buffer.

        Raises UserError where the run has no parts of that kind, there is no room and no autoscaler
        that could make some, or the registry does not answer.
        """
        wanted = {kind: len(self._names(kind)) for kind in _PREFIXES}
        for kind, number in (("actors", actors), ("replicas", replicas)):
            if number is not None and not wanted[kind]:
                raise UserError(f"this run has no {kind}: its objective or task asks for none")
            wanted[kind] = wanted[kind] if number is None else number
        if not may_grow():
            numbers = {_KEYS[kind]: number for kind, number in wanted.items() if number}
            check_fit(self.config.changed(numbers), living_nodes())
        self.given_up = ""
        gone = [name for kind in wanted for name in self._in_order_of_need(kind)[wanted[kind] :]]
        try:
            self._announce(without=gone, wait=True)
        except (PeerTimeout, PeerDied) as error:
            raise UserError(f"no replica could be withdrawn: {error}") from error
        self._added.difference_update(gone)
        for name in gone:
            self._dismiss(self.groups.pop(name))
        for kind, number in wanted.items():
            for _ in range(number - len(self._names(kind))):
                self._add(_PREFIXES[kind])

    def counts(self) -> dict[str, dict[str, int]]:
        """Desired and running numbers of actors and reward replicas; those that leave still run."""
        running = [group for group in self._parts() if group.phase is Phase.RUNNING]
        return {
            "desired": {kind: len(self._names(kind)) for kind in _PREFIXES},
            "actual": {
                kind: sum(group.name.startswith(prefix) for group in running)
                for kind, prefix in _PREFIXES.items()
            },
        }

    def actor_totals(self) -> dict[str, float]:
        """Counters over all actors, those that died or left included; times in seconds."""
        totals: Counter[str] = Counter()
        for status in (*(group.status for group in self._parts("actor-")), *self._retired):
            totals.update(status)
        del totals["version"]
        return dict(totals)

    def record_metrics(self, learner: Mapping[str, float], buffer: ReplayStats) -> None:
        """Hand metrics of every part to Prometheus, by way of Ray."""
        for group in reversed(self._parts()):  # after one of the same name that leaves
            self._record(group)
        self._telemetry.record_run(learner, buffer, self.counts())

    def stop(self, timeout_s: float) -> list[str]:
        """Have every part end as `end_in_order` says; names of those that had to be killed."""
        parts = self._parts()
        killed = end_in_order(
            parts,
            timeout_s=timeout_s,
            report=self.report,
            watch=lambda: self._announce(wait=False),
        )
        self._collect_reports(last=True)
        for group in parts:
            group.kill()
        self.over = True
        return killed

    def _report_waiting(self) -> None:
        waiting = [
            group
            for group in self.groups.values()
            if group.phase is Phase.PLACING
            and group.phase_s > _PLACEMENT_NOTICE_S
            and group not in self._waited
        ]
        if waiting:
            self._waited.extend(waiting)
            wanted = ", ".join(f"{group.name} ({group.launch.wanted})" for group in waiting)
            limit_s = self.config.cluster.start_timeout_s
            self.report(f"waiting up to {limit_s:.0f} s for a place for {wanted}: {room()}")

    def _parts(self, prefix: str = "") -> list[WorkerGroup]:
        """Groups of one kind or of all, those that leave included."""
        groups = [*self.groups.values(), *(group for group, _ in self._leaving)]
        return [group for group in groups if group.name.startswith(prefix)]

    def _names(self, kind: str) -> list[str]:
        """Names of the groups of a kind that the run wants, by number."""
        prefix = _PREFIXES[kind]
        names = [name for name in self.groups if name.startswith(prefix)]
        return sorted(names, key=lambda name: int(name.removeprefix(prefix)))

    def _in_order_of_need(self, kind: str) -> list[str]:
        """Names of a kind, in the order in which they stay when there are to be fewer."""
        up = [name for name, group in self.groups.items() if group.phase is Phase.RUNNING]
        return sorted(self._names(kind), key=lambda name: (name != "actor-0", name not in up))

    def _add(self, prefix: str) -> None:
        """Launch one more, under the lowest number that is free."""
        numbered = (f"{prefix}{number}" for number in itertools.count())
        name = next(name for name in numbered if name not in self.groups)
        del self._deaths[name]
        self._added.add(name)
        self._launch(name)

    def _clear_up(self, name: str, group: WorkerGroup, *, ever_ran: bool) -> None:
        """Collect the last reports of a part that failed, end what is left of it, and go on."""
        if name == "learner":
            self._collect_reports()
        group.kill()
        if name not in self._added:
            self._replace(name, group, ever_ran=ever_ran)
            return
        self._added.discard(name)
        del self.groups[name]
        text = f"{group.cause}; given up"
        self.given_up = f"{self.given_up}; {text}" if self.given_up else text
        self.report(text)

    def _replace(self, name: str, group: WorkerGroup, *, ever_ran: bool) -> None:
        # A verifier that cannot be used fails in its successor as well.
        if isinstance(group.error, Unrecoverable | CheckFailed | UnusableCheck):
            raise group.error
        self._deaths[name] += 1
        deaths, limit = self._deaths[name], self.config.cluster.max_restarts
        if not ever_ran and deaths == 1:
            raise StartFailed(f"could not start {group.cause}")
        self.report(f"{group.cause}; replacing it")
        if deaths > limit:
            raise RunFailed(
                f"{name} died {deaths} times (cluster.max_restarts = {limit}); last: {group.cause}"
            )
        self._retire(group)
        self._launch(name)

    def _launch(self, name: str) -> None:
        incarnation = self._launches[name]
        self._launches[name] += 1
        launch = self.launcher.launch(self.context, name, incarnation=incarnation)
        self.groups[name] = WorkerGroup(
            name, launch, incarnation=incarnation, config=self.config.cluster
        )

    def _dismiss(self, group: WorkerGroup) -> None:
        """Have a group leave: an actor stores what is being scored, a replica answers its calls.

        One that does not run yet holds nothing and is ended at once.
        """
        if group.phase is Phase.RUNNING:
            group.ask_to_stop()
            self._leaving.append((group, time.monotonic() + self.config.cluster.stop_timeout_s))
        else:
            self._part_with(group, f"{group.name} has left")

    def _let_go(self) -> None:
        """Part with the groups that have left, and with those that have not by their deadline."""
        for group, deadline in list(self._leaving):
            runs_on = group.poll() is Phase.RUNNING
            if runs_on and time.monotonic() < deadline:
                continue
            self._leaving.remove((group, deadline))
            end = f"{group.name} has left"
            if runs_on:
                limit = f"{self.config.cluster.stop_timeout_s:.0f} s (cluster.stop_timeout_s)"
                end = f"{group.name} did not stop within {limit} and was killed"
            elif group.phase is Phase.FAILED:
                end = f"{group.cause}; it was leaving"
            self._part_with(group, end)

    def _part_with(self, group: WorkerGroup, end: str) -> None:
        group.kill()
        self._retire(group)
        self.report(end)

    def _retire(self, group: WorkerGroup) -> None:
        """Keep and record the last counters of a part that is gone."""
        self._record(group)
        if group.name.startswith("actor-"):
            self._retired.append(group.status)

    def _record(self, group: WorkerGroup) -> None:
        self._telemetry.record_part(group.name, group.status, incarnation=group.incarnation)

    def _collect_reports(self, *, last: bool = False) -> None:
        """Take over the learner's rows of metrics, and report its messages.

        Args:
            last: wait for all that there is, as is done after an error of the learner's own, whose
                process lives; else for nothing, so that a dead or silent one holds nobody up.
        """
        learner = self.groups["learner"]
        failed = learner.phase is Phase.FAILED
        timeout_s = _LAST_WORDS_S if last or learner.error is not None else 0.0
        try:
            self.learner_rows += learner.reports("rows", timeout_s=timeout_s)
            for message in learner.reports("events", timeout_s=timeout_s):
                self.report(f"learner: {message}")
        except Exception as error:  # the learner's death is for its group to find
            if not failed:
                self.report(f"learner metrics not read: {type(error).__name__}")

    def _announce(self, *, without: Sequence[str] = (), wait: bool) -> None:
        names = tuple(
            f"{name}.{group.incarnation}"
            for name, group in self.groups.items()
            if name.startswith("reward-") and group.phase is Phase.RUNNING and name not in without
        )
        self._registry.announce(names, wait=wait)
