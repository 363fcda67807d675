"""The two small processes of a run that need no torch: weight store and replica registry.

One that is started again is empty until the learner's next publication or the supervisor's next
announcement; nobody waits for either.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from cluster.distributed.source_check import check_source
from cluster.run.awake import awake_s
from cluster.run.weight_store import WeightStore

_PING_EVERY_S = 1.0


class Service:
    """A process that answers short calls."""

    @ray.method(max_task_retries=0)
    def ping(self) -> int:
        """Show by its id that this process answers; if it dies meanwhile, by an error."""
        return os.getpid()

    def check_source(self, expected: str) -> None:
        """Raise SourceMixture unless this process runs what the driver does."""
        check_source(expected, node=ray.util.get_node_ip_address())


class WeightStoreService(Service, WeightStore["ray.ObjectRef[NDArray[np.uint8]]"]):
    """The weight store of a distributed run.

    It hands out references, and a node fetches the bytes behind one once, whoever reads them there.
    They are this process's own: a learner that dies takes nothing with it.
    """

    def take(self, data_N: NDArray[np.uint8], *, version: int, checksum: str) -> None:
        """Publish the bytes of an adapter; raises StaleWeights."""
        self.publish(ray.put(data_N), version=version, checksum=checksum)


class ReplicaRegistry(Service):
    """Knows the names of the reward replicas that answer."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()

    def announce(self, names: tuple[str, ...]) -> None:
        self._names = names

    def names(self) -> tuple[str, ...]:
        """Names of the Ray actors that score; empty while none does."""
        return self._names


@dataclass
class ServiceWatch:
    """Finds out that a service is silent, and has Ray start it again.

    One that dies is started again by Ray itself. From the error of a ping that its death cut off,
    it has the time of a start until it answers; where no ping was under way, its death shows by
    the id of the process that answers next.
    """

    name: str
    handle: ActorHandle
    timeout_s: float  # longest that it may leave a ping unanswered
    start_timeout_s: float  # longest that it may take to answer after a death, starting anew
    _starts: bool = field(default=False, init=False)
    _process: int | None = field(default=None, init=False)  # that answered last
    _ping: "ray.ObjectRef[Any] | None" = field(default=None, init=False)
    _asked_s: float = field(default=0.0, init=False)

    def poll(self) -> str:
        """What became of it just now, for people; empty while it answers or may yet."""
        now = awake_s()
        if self._ping is None:
            self._send(now)
        elif ray.wait([self._ping], timeout=0)[0]:
            news = self._hear(self._ping)
            if now - self._asked_s > _PING_EVERY_S:
                self._send(now)
            return news
        elif now - self._asked_s > (limit_s := self._limit_s):
            key = "start" if self._starts else "silence"
            ray.kill(self.handle, no_restart=False)
            self._ping, self._starts = None, True
            limit = f"{limit_s:.0f} s (cluster.{key}_timeout_s)"
            return f"{self.name}: no answer for {limit}; replacing it"
        return ""

    def _hear(self, ping: "ray.ObjectRef[Any]") -> str:
        """Take the answer or the error of a ping; tell a death once, which is Ray's to see to.

        A call that comes while no process is there waits for the next one, and shows nothing.
        """
        known, was_starting = self._process, self._starts
        try:
            self._process, self._starts = ray.get(ping), False
        except RayActorError:
            self._starts = True
            return "" if was_starting else f"{self.name}: died; Ray is starting it again"
        is_another = known is not None and self._process != known and not was_starting
        return f"{self.name}: died; Ray has started it again" if is_another else ""

    @property
    def _limit_s(self) -> float:
        return max(self.timeout_s, self.start_timeout_s if self._starts else 0.0)

    def _send(self, now_s: float) -> None:
        self._ping, self._asked_s = self.handle.ping.remote(), now_s
