"""The weight board as a process; apart from the other workers, because it needs no torch."""

import ray

from cluster.distributed.source_check import check_source
from cluster.run.weight_store import WeightBoard


class BoardWorker(WeightBoard):
    """The weight board of a distributed run."""

    def check_source(self, expected: str) -> None:
        """Raise SourceMixture unless this process runs what the driver does."""
        check_source(expected, node=ray.util.get_node_ip_address())
