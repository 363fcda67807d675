"""The process of one rank of a reward replica."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from threading import Lock
from typing import Any, ClassVar

import ray

from cluster.distributed.clients import RemotePeer
from cluster.distributed.worker import Meeting, Member, RunContext, Worker
from reward.replica import RewardReplica

_HEALTH_POLL_S = 0.5
# A caller that looked a replica up just before it was withdrawn calls within this time.
_QUIET_S = 0.5
_LAST_CALLS_POLL_S = 0.05


class CallCounter:
    """Counts the calls that a process is answering, so that it can end once no caller waits."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._number = 0
        self._last_s = float("-inf")  # of the monotonic clock

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count one call for as long as the context lasts; from any thread."""
        with self._lock:
            self._number += 1
        try:
            yield
        finally:
            with self._lock:
                self._number -= 1
                self._last_s = time.monotonic()

    def quiet_s(self) -> float:
        """Seconds since the last call ended: 0 during a call, infinite before the first."""
        with self._lock:
            return 0.0 if self._number else time.monotonic() - self._last_s


class RewardWorker(Worker):
    """One rank of a reward replica; rank 0 answers the actors and leads the others."""

    # An unanswered `score` holds a thread, and an actor has 16 or so. `status`, `progress` and
    # `stop` have threads of their own, so they never queue behind scorings.
    concurrency_groups: ClassVar[Mapping[str, int]] = {"scoring": 256}

    def __init__(self, context: RunContext, member: Member) -> None:
        super().__init__(context, member)
        self._calls = CallCounter()

    def _build(self, meeting: Meeting) -> None:
        """Join the other ranks and take this rank's shard of the frozen LM."""
        config, member = self._config, self._member
        self._shard = self._context.parts.reward_rank(
            config, lambda: self._meet(meeting, config.reward.deadline_s)
        )
        if member.rank == 0:
            peers = [RemotePeer(handle) for handle in member.peers]
            self._replica = RewardReplica(self._shard, peers, config.reward, name=member.full_name)

    @ray.method(concurrency_group="scoring")
    def score(self, items: list[Any]) -> list[Any]:
        """Log-rewards of the items (rank 0 only)."""
        with self._calls.count():
            return self._replica.score(items)

    def forward(self, share: Sequence[Any]) -> list[Any]:
        """This rank's part of one scoring (ranks above 0)."""
        return list(self._shard.forward(share))

    def run(self) -> dict[str, Any]:
        """Serve until stopped and no call is held or comes any more.

        Raises RuntimeError where the ranks are out of step: the replica must be built anew.
        """
        while not self._stopping.wait(timeout=_HEALTH_POLL_S):
            self._check_health()
        stopping_since = time.monotonic()
        while min(self._calls.quiet_s(), time.monotonic() - stopping_since) < _QUIET_S:
            self._check_health()
            time.sleep(_LAST_CALLS_POLL_S)
        return self.status()

    def _check_health(self) -> None:
        if self._member.rank == 0 and not self._replica.healthy():
            raise RuntimeError("a pass over the ranks failed or outlasted its deadline")

    def status(self) -> dict[str, Any]:
        """The replica's counters; nothing on ranks above 0."""
        return asdict(self._replica.stats()) if self._member.rank == 0 else {}
