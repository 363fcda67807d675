"""The process that evaluates."""

from pathlib import Path
from typing import Any

from cluster.distributed.worker import Meeting, Member, RunContext, Worker
from cluster.run.directory import check_seen, check_shared
from cluster.run.evaluation import evaluate


class EvaluationWorker(Worker):
    """Evaluates the base (None), or an adapter after that many steps, on the task's test data."""

    def __init__(
        self, context: RunContext, member: Member, adapter: Path | None, step: int
    ) -> None:
        super().__init__(context, member)
        self._adapter = adapter
        self._step = step
        self._stages, self._stage = 0, "loading the language model"

    def run(self) -> dict[str, Any]:
        """The Evaluation under "evaluation"."""
        found = evaluate(
            self._config, adapter=self._adapter, step=self._step, progress=self._count_stage
        )
        return {"evaluation": found}

    def status(self) -> dict[str, Any]:
        """How many stages it has told of, and the last."""
        return {"stages": self._stages, "stage": self._stage}

    def _build(self, _: Meeting) -> None:
        if self._adapter is not None:
            check_shared(self._adapter.parent, node=self._node)
            if self._config.learner.traits.trains_model:
                check_seen("em.policy", self._config.em.policy, node=self._node)

    def _count_stage(self, stage: str) -> None:
        self._stages, self._stage = self._stages + 1, stage
