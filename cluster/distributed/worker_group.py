"""A worker group: the ranks of one component, which live and die together.

A rollout actor is a worker group of one; a reward replica has W ranks, the learner M. The
supervisor owns worker groups and calls `poll` often; nothing here waits.

    PLACING -> MEETING -> STARTING -> RUNNING -> FINISHED
        any of the first four -> FAILED, with the cause; ranks that still live may be asked, and
                                 are the supervisor's to kill
"""

from collections import Counter
from enum import StrEnum
from itertools import zip_longest
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from cluster.config.placement import ClusterConfig
from cluster.distributed.launcher import GroupLaunch
from cluster.distributed.ray_cluster import node_ids, room
from cluster.distributed.waiting import cause_of, error_line
from cluster.run.awake import awake_s

_LOOK_S = 1.0  # between two looks at how far a start is


class Phase(StrEnum):
    """Where a worker group is in its life."""

    PLACING = "placing"  # waits for room on the cluster
    MEETING = "meeting"  # all ranks are up, and rank 0 says where they meet
    STARTING = "starting"  # every rank builds what it holds
    RUNNING = "running"
    FINISHED = "finished"  # `run` returned on every rank
    FAILED = "failed"


class StartFailed(RuntimeError):
    """A part of the run did not come up; says which, in which phase and why."""


class WorkerGroup:
    """Ranks that live and die together.

    Args:
        incarnation: how many groups of this name the run had before.
        config: `start_timeout_s` for a group that does not run yet to come further;
            `silence_timeout_s` for a running rank to answer `status`.
    """

    def __init__(
        self, name: str, launch: GroupLaunch, *, incarnation: int, config: ClusterConfig
    ) -> None:
        self.name = name
        self.launch = launch
        self.incarnation = incarnation
        self.phase = Phase.PLACING
        self.cause = ""  # of its failure, for people
        self.error: BaseException | None = None  # what a rank itself raised, if that was its end
        self.status: dict[str, Any] = {}
        self.result: dict[str, Any] | None = None
        self.handles: list[ActorHandle] = []
        self._config = config
        self._began = self._progressed = self._looked = awake_s()
        self._progress: list[int] = []  # of its start, the most that was seen
        self._progress_refs: list[ray.ObjectRef[Any]] = []
        self._refs: list[ray.ObjectRef[Any]] = [launch.ready]
        self._status_refs: list[ray.ObjectRef[Any]] = []
        self._status_requested = 0.0
        self._taken: Counter[str] = Counter()
        self._reports: dict[str, ray.ObjectRef[Any]] = {}

    @property
    def phase_s(self) -> float:
        """Seconds since it asked for a place, or since it has one."""
        return awake_s() - self._began

    @property
    def leader(self) -> ActorHandle:
        return self.handles[0]

    def poll(self) -> Phase:
        """Go on to the next phase if this one is done; the phase now."""
        if self.phase in (Phase.FINISHED, Phase.FAILED):
            return self.phase
        done, waiting = ray.wait(self._refs, num_returns=len(self._refs), timeout=0)
        try:
            values = ray.get(done)
        except Exception as error:  # whatever ended the rank is the group's cause of death
            self._fail_with(error)
            return self.phase
        if not waiting:
            self._advance(values)
        elif self.phase is Phase.RUNNING:
            self._listen()
        else:
            self._watch_start()
        return self.phase

    def reports(self, kind: str, *, timeout_s: float = 0.0) -> list[Any]:
        """What a worker with `reports_since` has added to one kind since the last call.

        With `timeout_s` = 0 it waits for nothing, and the rest comes with a later call; else for
        all that there is. Raises what came instead; the group's death is for `poll` to find.
        """
        found: list[Any] = []
        while True:
            ref = self._reports.pop(kind, None)
            # One that failed may have more than its status said; often its process still lives.
            last_words = self.phase is Phase.FAILED and not found
            if ref is None and (last_words or self.status.get(kind, 0) > self._taken[kind]):
                ref = self.leader.reports_since.remote(kind, self._taken[kind])
            if ref is None:
                return found
            if not ray.wait([ref], timeout=timeout_s)[0]:
                self._reports[kind] = ref
                return found
            came = ray.get(ref)
            self._taken[kind] += len(came)
            found.extend(came)
            if not timeout_s or not came:
                return found

    def ask_to_stop(self) -> None:
        """Tell every rank to finish; `poll` shows when they have."""
        for handle in self.handles:
            handle.stop.remote()

    def kill(self) -> None:
        """End every rank at once, and give up the place."""
        for handle in self.handles:
            ray.kill(handle)
        self.launch.give_up()

    def _advance(self, values: list[Any]) -> None:
        if self.phase is Phase.PLACING:
            self.handles = self.launch.create()
            others = [handle.progress.remote() for handle in self.handles[1:]]  # once they are up
            self._refs = [self.leader.rendezvous.remote(), *others]
            self._began = self._progressed = awake_s()
            self._progress = []
            self.phase = Phase.MEETING
        elif self.phase is Phase.MEETING:
            self._refs = [handle.start.remote(values[0]) for handle in self.handles]
            self.phase = Phase.STARTING
        elif self.phase is Phase.STARTING:
            self._refs = [handle.run.remote() for handle in self.handles]
            self.phase = Phase.RUNNING
        else:
            self.result = self.status = values[0]
            self.phase = Phase.FINISHED

    def _watch_start(self) -> None:
        """Fail where nothing has come of a start for too long."""
        now = awake_s()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            # Only a rise counts: a node that comes and goes brings no place nearer.
            most = [max(pair) for pair in zip_longest(self._look(), self._progress, fillvalue=0)]
            if most != self._progress:
                self._progress, self._progressed = most, now
        if now - self._progressed <= self._config.start_timeout_s:
            return
        limit = f"{self._config.start_timeout_s:.0f} s (cluster.start_timeout_s)"
        if self.phase is Phase.PLACING:
            self._fail(f"no place within {limit} for {self.launch.wanted}: {room()}")
        else:
            self._fail(f"{self.phase} made no progress for {limit}")

    def _look(self) -> list[int]:
        """What rises as a start goes on: the nodes there are, or what each rank has read and holds.

        Empty where the ranks have nothing new to say.
        """
        if self.phase is Phase.PLACING:
            return [len(node_ids())]
        if not self._progress_refs:
            self._progress_refs = [handle.progress.remote() for handle in self.handles]
        refs = self._progress_refs
        if ray.wait(refs, num_returns=len(refs), timeout=0)[1]:
            return []
        self._progress_refs = []
        try:
            progress: list[int] = ray.get(refs)
            return progress
        except Exception:  # what ended a rank comes with its start
            return []

    def _listen(self) -> None:
        """Ask every rank for its status again and again; the group's is that of rank 0."""
        now, limit_s = awake_s(), self._config.silence_timeout_s
        if not self._status_refs:
            self._status_refs = [handle.status.remote() for handle in self.handles]
            self._status_requested = now
            return
        refs = self._status_refs
        silent = ray.wait(refs, num_returns=len(refs), timeout=0)[1]
        if not silent:
            try:
                self.status = ray.get(refs)[0]
            except Exception as error:
                self._fail_with(error)
            self._status_refs = []
        elif now - self._status_requested > limit_s:
            ranks = ", ".join(str(refs.index(ref)) for ref in silent)
            who = f" from rank {ranks} of {len(refs)}" if len(refs) > 1 else ""
            limit = f"{limit_s:.0f} s (cluster.silence_timeout_s)"
            self._fail(f"no answer to status{who} for {limit}")

    def _fail_with(self, error: Exception) -> None:
        if isinstance(error, RayTaskError):
            self.error = cause_of(error)
        self._fail(error_line(error))

    def _fail(self, cause: str) -> None:
        self.cause = f"{self.name}: {cause}"
        self.phase = Phase.FAILED
