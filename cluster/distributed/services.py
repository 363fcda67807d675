"""The two small processes of a run that need no torch: weight store and replica registry.

Ray starts each again should it die, and `ServiceWatch` has it do so should one fall silent. It is
empty then until the learner's next publication and the supervisor's next announcement; nobody
waits for either.
"""

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

    def ping(self) -> None:
        """Show that this process answers."""

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
        """Replace the names."""
        self._names = names

    def names(self) -> tuple[str, ...]:
        """Names of the Ray actors that score; empty while none does."""
        return self._names


class ServiceWatch:
    """Finds out that a service is silent, and has Ray start it again.

    Args:
        name: for people.
        timeout_s: longest that it may leave a ping unanswered.
        start_timeout_s: longest that it may take to answer after a death, when it starts anew.
    """

    def __init__(
        self, name: str, handle: ActorHandle, *, timeout_s: float, start_timeout_s: float
    ) -> None:
        self._name = name
        self._handle = handle
        self._timeout_s = timeout_s
        self._start_timeout_s = max(timeout_s, start_timeout_s)
        self._starts = False
        self._ping: ray.ObjectRef[Any] | None = None
        self._asked_s = awake_s()

    def poll(self) -> str:
        """Why it was killed just now, for people; empty if it was not."""
        now = awake_s()
        if self._ping is None:
            self._send(now)
        elif ray.wait([self._ping], timeout=0)[0]:
            self._starts = not _answered(self._ping)  # a death is Ray's to see to
            if now - self._asked_s > _PING_EVERY_S:
                self._send(now)
        elif now - self._asked_s > (limit_s := self._limit_s):
            key = "start" if self._starts else "silence"
            ray.kill(self._handle, no_restart=False)
            self._ping, self._starts = None, True
            limit = f"{limit_s:.0f} s (cluster.{key}_timeout_s)"
            return f"{self._name}: no answer for {limit}; replacing it"
        return ""

    @property
    def _limit_s(self) -> float:
        return self._start_timeout_s if self._starts else self._timeout_s

    def _send(self, now_s: float) -> None:
        self._ping = self._handle.ping.remote()
        self._asked_s = now_s


def _answered(ping: "ray.ObjectRef[Any]") -> bool:
    """Tell whether a ping that has ended was answered, and not cut off by the service's death."""
    try:
        ray.get(ping)
    except RayActorError:
        return False
    return True
