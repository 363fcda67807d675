"""The weight board as a process; apart from the other workers, because it needs no torch."""

import ray

from cluster.board import WeightBoard
from cluster.fingerprint import check_source


class BoardWorker(WeightBoard):
    """The weight board of a distributed run."""

    def check_source(self, expected: str) -> None:
        """Raise SourceMixture unless this process runs what the driver does."""
        check_source(expected, node=ray.util.get_node_ip_address())
