"""The two small processes of a run that need no torch: weight store and replica registry.

One that is started again is empty until the learner's next publication or the supervisor's next
announcement; nobody waits for either.
"""

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from cluster.distributed.source_check import check_source
from cluster.run.awake import awake_s
from cluster.run.weight_store import WeightStore

_PING_EVERY_S = 1.0


class Service:
    """A process that answers short calls."""

    @ray.method(max_task_retries=0)
    def ping(self) -> None:
        """Show that this process answers; one that dies meanwhile shows it by an error."""

    def check_source(self, expected: str) -> None:
        """Raise SourceMixture unless this process runs what the driver does."""
        check_source(expected, node=ray.util.get_node_ip_address())


class WeightStoreService(Service, WeightStore):
    """The weight store of a distributed run."""


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
    """Finds out that a service is silent, and has Ray start it again."""

    name: str
    handle: ActorHandle
    timeout_s: float  # longest that it may leave a ping unanswered
    start_timeout_s: float  # longest that it may take to answer after a death, starting anew
    _starts: bool = field(default=False, init=False)
    _ping: "ray.ObjectRef[Any] | None" = field(default=None, init=False)
    _asked_s: float = field(default=0.0, init=False)

    def poll(self) -> str:
        """What became of it just now, for people; empty while it answers or may yet."""
        now = awake_s()
        if self._ping is None:
            self._send(now)
        elif ray.wait([self._ping], timeout=0)[0]:
            was_starting, self._starts = self._starts, not _answered(self._ping)
            if now - self._asked_s > _PING_EVERY_S:
                self._send(now)
            if self._starts and not was_starting:
                return f"{self.name}: died; Ray is starting it again"
        elif now - self._asked_s > (limit_s := self._limit_s):
            key = "start" if self._starts else "silence"
            ray.kill(self.handle, no_restart=False)
            self._ping, self._starts = None, True
            limit = f"{limit_s:.0f} s (cluster.{key}_timeout_s)"
            return f"{self.name}: no answer for {limit}; replacing it"
        return ""

    @property
    def _limit_s(self) -> float:
        return max(self.timeout_s, self.start_timeout_s if self._starts else 0.0)

    def _send(self, now_s: float) -> None:
        self._ping, self._asked_s = self.handle.ping.remote(), now_s


def _answered(ping: "ray.ObjectRef[Any]") -> bool:
    """Tell whether a ping that has ended was answered, and not cut off by the service's death."""
    try:
        ray.get(ping)
    except RayActorError:
        return False
    return True
