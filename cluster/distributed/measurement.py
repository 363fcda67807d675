"""An evaluation in a process of its own."""

import time
from collections.abc import Callable

from cluster.config.schema import ClusterConfig
from cluster.distributed.launcher import GroupLaunch
from cluster.distributed.waiting import PeerDied, PeerTimeout
from cluster.distributed.worker_group import Phase, WorkerGroup
from tasks.evaluation.evaluation import Evaluation

STAGE_TIMEOUT_S = 3600.0
_POLL_S = 0.2


class RemoteMeasurement:
    """An evaluation whose process is replaced should it die or fall silent.

    Args:
        launch: launches the process; takes the number of those before it.
        report: takes one line for people each time that the process is replaced.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[int], GroupLaunch],
        config: ClusterConfig,
        report: Callable[[str], None],
    ) -> None:
        self._name = name
        self._launch = launch
        self._config = config
        self._report = report
        self._stages = 0
        self._group = self._begin(0)

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        group = self._group
        phase = group.poll()
        stages = group.status.get("stages", 0)
        if phase is not Phase.RUNNING or stages != self._stages:
            self._stages, self._progressed_s = stages, time.monotonic()
        replaceable = group.error is None and group.incarnation < self._config.max_restarts
        if phase is Phase.FAILED and replaceable:
            self._report(f"{group.cause}; replacing it")
            group.kill()
            self._group = self._begin(group.incarnation + 1)
            return False
        is_late = time.monotonic() - self._progressed_s > STAGE_TIMEOUT_S
        return phase in (Phase.FINISHED, Phase.FAILED) or is_late

    def result(self) -> Evaluation:
        """Wait for the answer and end the process.

        Raises PeerTimeout after STAGE_TIMEOUT_S without progress, PeerDied after more deaths than
        `cluster.max_restarts`, and whatever the evaluation raised, as its own class.
        """
        try:
            while not self.done():
                time.sleep(_POLL_S)
            if self._group.error is not None:
                raise self._group.error
            if self._group.phase is Phase.FAILED:
                raise PeerDied(self._group.cause)
            if self._group.result is None:
                raise PeerTimeout(
                    f"{self._name}: no progress of its evaluation within {STAGE_TIMEOUT_S:.0f} s"
                )
            answer: Evaluation = self._group.result["evaluation"]
            return answer
        finally:
            self._group.kill()

    def _begin(self, incarnation: int) -> WorkerGroup:
        self._progressed_s = time.monotonic()
        launch = self._launch(incarnation)
        return WorkerGroup(self._name, launch, incarnation=incarnation, config=self._config)
