"""What a driver steps and asks to evaluate: a run over Ray, or one in this process."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray

from buffer.stats import ReplayStats
from cluster.config.schema import RunConfig
from cluster.distributed.launcher import Launcher
from cluster.distributed.nodes import living_nodes, may_grow, room
from cluster.distributed.parts import Parts
from cluster.distributed.patience import with_patience
from cluster.distributed.ray_cluster import connect_ray, namespace_of
from cluster.distributed.source_check import SourceMixture, source_fingerprint
from cluster.distributed.supervisor import Supervisor
from cluster.distributed.waiting import PeerTimeout, cause_line, wait_for
from cluster.distributed.worker import RunContext
from cluster.distributed.worker_group import StartFailed
from cluster.evaluation.measure import measure
from cluster.evaluation.measurement import Measurement
from cluster.run.directory import RunDirectory
from cluster.run.local import LocalRun
from cluster.run.resources import check_fit

EVALUATION_TIMEOUT_S = 3600.0


class Run(Protocol):
    """A run as its driver sees it: over Ray (`Supervisor`) or in one process (`LocalRun`)."""

    learner_rows: list[dict[str, float]]

    @property
    def running(self) -> bool:
        """Whether every part has come up."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the learner has done its steps."""
        ...

    @property
    def learner_status(self) -> Mapping[str, Any]:
        """Step and version."""
        ...

    @property
    def settled(self) -> bool:
        """Whether all parts that are wanted run, and no others."""
        ...

    @property
    def given_up(self) -> str:
        """Why parts that the last `scale` added were given up; empty if none were."""
        ...

    def scale(self, *, actors: int | None = None, replicas: int | None = None) -> None:
        """Have these numbers from now on; raises ScaleRefused or DoesNotFit."""
        ...

    def tick(self) -> None:
        """Do or watch a little."""
        ...

    def counts(self) -> dict[str, dict[str, int]]:
        """Desired and actual numbers of actors and replicas."""
        ...

    def actor_totals(self) -> dict[str, float]:
        """Counters summed over all actors."""
        ...

    def tell(self, learner: Mapping[str, float], buffer: ReplayStats) -> None:
        """Hand metrics to whoever collects them."""
        ...

    def stop(self, timeout_s: float) -> list[str]:
        """Stop in order; names of what had to be killed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferAddress:
    """Where the run's Redis is."""

    url: str
    password: str | None


class PendingMeasurement(Protocol):
    """An evaluation under way."""

    def done(self) -> bool:
        """Whether `result` would return at once."""
        ...

    def result(self) -> Measurement:
        """Wait for it, at most EVALUATION_TIMEOUT_S."""
        ...


class Session(Protocol):
    """Brings a run up and takes it down."""

    address: str  # of the Ray cluster; empty without Ray

    def open(self) -> None:
        """Get what every run needs, before any part of it starts."""
        ...

    def start(self, report: Callable[[str], None]) -> Run:
        """Start every part of the run."""
        ...

    def evaluate(self, adapter: Path | None) -> PendingMeasurement:
        """Begin to measure the base (None) or an adapter."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class LocalSession:
    """Everything in this process."""

    address = ""

    def __init__(self, config: RunConfig, directory: RunDirectory, buffer: BufferAddress) -> None:
        self._config = config
        self._directory = directory
        self._buffer = buffer

    def open(self) -> None:
        """Nothing is needed."""

    def start(self, report: Callable[[str], None]) -> LocalRun:
        """Build actor, replica and learner."""
        return LocalRun(
            self._config,
            run=self._directory.name,
            checkpoints=self._directory.checkpoints,
            adapter=self._directory.adapter,
            quarantine=self._directory.quarantine,
            report=report,
            buffer_url=self._buffer.url,
            buffer_password=self._buffer.password,
        )

    def evaluate(self, adapter: Path | None) -> "Future[Measurement]":
        """Measure now."""
        pending: Future[Measurement] = Future()
        pending.set_result(measure(self._config, adapter=adapter))
        return pending

    def close(self) -> None:
        """Nothing is left."""


class RaySession:
    """Processes on a Ray cluster: the one at `address`, or one started here for this run."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        buffer: BufferAddress,
        *,
        address: str | None,
        parts: Parts | None = None,
        synchronous: bool = False,
    ) -> None:
        self._parts = parts or Parts()
        self._synchronous = synchronous
        self.address = address or "started for this run"
        self._config = config
        self._directory = directory
        self._buffer = buffer
        self._cluster = address
        self._launcher = Launcher(config, namespace_of(directory.name))
        self._evaluations = 0

    def open(self) -> None:
        """Join or start Ray; raises DoesNotFit when the run is too large for it."""
        namespace = namespace_of(self._directory.name)
        connect_ray(self._config, self._cluster, namespace)
        if self._cluster is None:
            # What others need to join it; state.json tells them.
            self.address = ray.get_runtime_context().gcs_address
        # Where an autoscaler may add nodes, each part waits for its place instead.
        if self._cluster is None or not may_grow():
            check_fit(self._config, living_nodes())
        self._context = RunContext(
            config=with_patience(self._config),
            run=self._directory.name,
            checkpoints=self._directory.checkpoints,
            adapter=self._directory.adapter,
            quarantine=self._directory.quarantine,
            namespace=namespace,
            buffer_url=self._buffer.url,
            buffer_password=self._buffer.password,
            source=source_fingerprint(),
            board=self._launcher.board(),
            parts=self._parts,
            synchronous=self._synchronous,
        )
        self._check_board()

    def _check_board(self) -> None:
        """Raise StartFailed unless the weight board has come up, from this process's source."""
        try:
            wait_for(
                self._context.board.check_source.remote(self._context.source),
                peer="weight board",
                phase="start",
                timeout_s=self._config.cluster.start_timeout_s,
            )
        except SourceMixture as error:
            raise StartFailed(f"could not start the weight board: {cause_line(error)}") from None

    def start(self, report: Callable[[str], None]) -> Supervisor:
        """Launch every gang."""
        return Supervisor(self._config, self._launcher, self._context, report)

    def evaluate(self, adapter: Path | None) -> "RemoteMeasurement":
        """Measure in a process of its own, which ends with the answer."""
        self._evaluations += 1
        name = f"evaluator-{self._evaluations}"
        worker = self._launcher.evaluator(self._context, name=name)
        return RemoteMeasurement(worker, worker.evaluate.remote(adapter), name)

    def end_board(self) -> None:
        """End what `open` started, of a session whose cluster goes on without it."""
        ray.kill(self._context.board)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends with all its processes."""
        ray.shutdown()


class RemoteMeasurement:
    """An evaluation in another process."""

    def __init__(self, worker: Any, ref: "ray.ObjectRef[Any]", name: str) -> None:
        self._worker = worker
        self._ref = ref
        self._name = name
        self._deadline = time.monotonic() + EVALUATION_TIMEOUT_S

    def done(self) -> bool:
        """Whether the answer, or an error, is there, or the time for it is up."""
        return bool(ray.wait([self._ref], timeout=0)[0]) or time.monotonic() >= self._deadline

    def result(self) -> Measurement:
        """Wait for the answer and end the process.

        Raises:
            PeerTimeout, PeerDied: no answer within EVALUATION_TIMEOUT_S of the request.
        """
        remaining_s = max(0.0, self._deadline - time.monotonic())
        try:
            answer: Measurement = wait_for(
                self._ref, peer=self._name, phase="evaluation", timeout_s=remaining_s
            )
            return answer
        except PeerTimeout as error:
            raise PeerTimeout(
                f"{self._name}: no answer to evaluation within {EVALUATION_TIMEOUT_S:.0f} s; "
                f"{room()}"
            ) from error
        finally:
            ray.kill(self._worker)
