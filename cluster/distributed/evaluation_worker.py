"""The process that evaluates."""

from pathlib import Path
from typing import Any

from cluster.distributed.worker import Meeting, Member, RunContext, Worker
from cluster.run.directory import check_shared
from cluster.run.evaluation import evaluate


class EvaluationWorker(Worker):
    """Evaluates the base (None), or an adapter after that many steps, on the task's test data."""

    def __init__(
        self, context: RunContext, member: Member, adapter: Path | None, step: int
    ) -> None:
        super().__init__(context, member)
        self._adapter = adapter
        self._step = step
        self._stages = 0

    def run(self) -> dict[str, Any]:
        """The Evaluation under "evaluation"."""
        found = evaluate(
            self._config, adapter=self._adapter, step=self._step, progress=self._count_stage
        )
        return {"evaluation": found}

    def status(self) -> dict[str, Any]:
        return {"stages": self._stages}

    def _build(self, _: Meeting) -> None:
        if self._adapter is not None:
            check_shared(self._adapter.parent, node=self._node)

    def _count_stage(self, _: str) -> None:
        self._stages += 1
