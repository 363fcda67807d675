"""A run on a Ray cluster, as its driver sees it."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import ray

from cluster.config.schema import RunConfig
from cluster.distributed.launcher import GroupLaunch, Launcher
from cluster.distributed.measurement import RemoteMeasurement
from cluster.distributed.parts import Parts
from cluster.distributed.ray_cluster import connect_ray, hasty, living_nodes, may_grow, namespace_of
from cluster.distributed.services import ReplicaRegistry, WeightStoreService
from cluster.distributed.source_check import SourceMixture, source_fingerprint
from cluster.distributed.supervisor import Supervisor
from cluster.distributed.waiting import error_line, wait_for
from cluster.distributed.worker import RunContext
from cluster.distributed.worker_group import StartFailed
from cluster.run.directory import RunDirectory
from cluster.run.resources import check_fit, has_place_for_evaluator, unclaimed_gpus
from cluster.run.session import BufferAddress


@dataclass
class RaySession:
    """Processes on a Ray cluster: the one at `cluster`, or one started here for this run."""

    config: RunConfig
    directory: RunDirectory
    buffer: BufferAddress
    _: KW_ONLY
    cluster: str | None
    parts: Parts = field(default_factory=Parts)
    synchronous: bool = False
    in_process = False

    def __post_init__(self) -> None:
        self.address = self.cluster or "started for this run"
        self._launcher = Launcher(self.config, namespace_of(self.directory.name))
        self._evaluations = 0
        self._run: Supervisor | None = None

    def open(self) -> None:
        """Join or start Ray; raises UserError when the run is too large for it."""
        namespace = namespace_of(self.directory.name)
        connect_ray(self.config, self.cluster, namespace)
        if self.cluster is None:
            # What others need to join it; state.json tells them.
            self.address = ray.get_runtime_context().gcs_address
        # Where an autoscaler may add nodes, each part waits for its place instead.
        if self.cluster is None or not may_grow():
            check_fit(self.config, living_nodes())
        self._context = RunContext(
            config=self.config,
            directory=self.directory,
            namespace=namespace,
            buffer=self.buffer,
            source=source_fingerprint(),
            weight_store=self._launcher.service(WeightStoreService, "weight-store"),
            replica_registry=self._launcher.service(ReplicaRegistry, "replica-registry"),
            parts=self.parts,
            synchronous=self.synchronous,
        )
        self._check_services()

    def _check_services(self) -> None:
        """Raise StartFailed unless both have come up, from this process's source."""
        context = self._context
        services = {
            "weight store": context.weight_store,
            "replica registry": context.replica_registry,
        }
        for name, service in services.items():
            ref = service.check_source.remote(context.source)
            limit_s = self.config.cluster.start_timeout_s
            try:
                wait_for(ref, peer=name, phase="start", timeout_s=limit_s)
            except SourceMixture as error:
                raise StartFailed(f"could not start the {name}: {error_line(error)}") from None

    def start(
        self, report: Callable[[str], None], stop: Callable[[], bool] = lambda: False
    ) -> Supervisor:
        nodes, grows = living_nodes(), may_grow()
        for sentence in (
            unclaimed_gpus(self.config, nodes, grows=grows),
            hasty(self.config) if grows or len(nodes) > 1 else "",
        ):
            if sentence:
                report(sentence)
        self._run = Supervisor(self.config, self._launcher, self._context, report)
        return self._run

    def evaluate(
        self,
        adapter: Path | None,
        report: Callable[[str], None],
        progress: Callable[[str], None],
        *,
        step: int,
    ) -> RemoteMeasurement:
        """Measure in a process of its own, which ends with the answer.

        It begins at once, or, where there is no place beside the run's parts, when they have ended.
        """
        self._evaluations += 1
        name = f"evaluator-{self._evaluations}"

        def launch(incarnation: int) -> GroupLaunch:
            return self._launcher.launch(
                self._context, name, adapter, step, incarnation=incarnation
            )

        def alone() -> bool:
            return self._run is not None and self._run.over

        beside = alone() or may_grow() or has_place_for_evaluator(self.config, living_nodes())
        return RemoteMeasurement(name, launch, self.config.cluster, report, beside, alone, progress)

    def end_services(self) -> None:
        """End what `open` started, of a session whose cluster goes on without it."""
        ray.kill(self._context.weight_store)
        ray.kill(self._context.replica_registry)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends with all its processes."""
        ray.shutdown()
