"""An evaluation in a process of its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.config.schema import ClusterConfig
from cluster.distributed.launcher import GroupLaunch
from cluster.distributed.waiting import PeerDied, PeerTimeout
from cluster.distributed.worker_group import Phase, WorkerGroup
from tasks.evaluation.evaluation import Evaluation

STAGE_TIMEOUT_S = 3600.0
_POLL_S = 0.2


@dataclass
class RemoteMeasurement:
    """An evaluation whose process is replaced should it die or fall silent.

    Where there is no place for it beside the parts of the run, it waits until they have ended.
    """

    name: str
    launch: Callable[[int], GroupLaunch]  # takes the number of processes before
    config: ClusterConfig
    report: Callable[[str], None]  # takes a line for people each time that one is replaced
    beside: bool = True  # whether there may be a place beside the parts of the run
    alone: Callable[[], bool] = lambda: True  # whether these have ended
    progress: Callable[[str], None] = lambda stage: None  # is told what is being done

    def __post_init__(self) -> None:
        self._stages = self._launches = 0
        self._group: WorkerGroup | None = None
        if self.beside:
            self._begin()
        else:
            self._wait()

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        if self._group is None:
            if self.alone():
                self._begin()
            return False
        group, before = self._group, self._group.phase
        phase = group.poll()
        stages = group.status.get("stages", 0)
        if stages > self._stages:
            self.progress(f"{self.name}: {group.status.get('stage', '')}")
        if phase is not Phase.RUNNING or stages != self._stages:
            self._stages, self._progressed_s = stages, time.monotonic()
        if phase is Phase.FAILED and before is Phase.PLACING and not self.alone():
            group.kill()
            self._wait()
            return False
        replaceable = group.error is None and group.incarnation < self.config.max_restarts
        if phase is Phase.FAILED and replaceable:
            self.report(f"{group.cause}; replacing it")
            group.kill()
            self._begin()
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
            group = self._group
            assert group is not None
            if group.error is not None:
                raise group.error
            if group.phase is Phase.FAILED:
                raise PeerDied(group.cause)
            if group.result is None:
                limit = f"{STAGE_TIMEOUT_S:.0f} s"
                raise PeerTimeout(f"{self.name}: no progress of its evaluation within {limit}")
            answer: Evaluation = group.result["evaluation"]
            return answer
        finally:
            if self._group is not None:
                self._group.kill()

    def _begin(self) -> None:
        incarnation = self._launches
        self._launches += 1
        self._progressed_s = time.monotonic()
        launch = self.launch(incarnation)
        self._group = WorkerGroup(self.name, launch, incarnation=incarnation, config=self.config)

    def _wait(self) -> None:
        self._group = None
        self.report(f"no place for {self.name} beside the other parts: it waits until they end")
