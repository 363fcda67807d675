"""The two small processes of a run that need no torch: weight store and replica registry.

Ray starts each again should it die. It is empty then until the learner's next publication and
the supervisor's next announcement; nobody waits for either.
"""

import ray

from cluster.distributed.source_check import check_source
from cluster.run.weight_store import WeightStore


class Service:
    """A process that answers short calls."""

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
