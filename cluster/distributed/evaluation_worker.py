"""The process that evaluates."""

from pathlib import Path

import ray

from cluster.distributed.source_check import check_source
from cluster.distributed.worker import RunContext, Worker
from cluster.run.directory import check_shared
from cluster.run.evaluation import evaluate
from tasks.evaluation.evaluation import Evaluation


class EvaluationWorker(Worker):
    """Evaluates the policy on the task's test data, before training and after."""

    def __init__(self, context: RunContext, *, name: str) -> None:
        super().__init__(context, name=name, rank=0, num_ranks=1)

    def evaluate(self, adapter: Path | None) -> Evaluation:
        """Results of the base (None) or of the adapter in a folder.

        Raises:
            SourceMixture: this process runs other source than the driver.
            RunNotShared: this node does not see the adapter.
        """
        node = ray.util.get_node_ip_address()
        check_source(self._context.source, node=node)
        if adapter is not None:
            check_shared(adapter.parent, node=node)
        return evaluate(self._context.config, adapter=adapter)
