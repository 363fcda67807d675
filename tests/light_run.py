"""A supervisor over processes that have no model in them, on the Ray cluster that is joined."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.config.file import load_config
from cluster.config.placement import Placement
from cluster.config.schema import RunConfig
from cluster.distributed.launcher import GroupLaunch, Launcher
from cluster.distributed.services import ReplicaRegistry
from cluster.distributed.supervisor import Supervisor
from cluster.distributed.worker import RunContext
from cluster.run.directory import RunDirectory
from tests.light_worker import CountingWorker

CLAIM = Placement(cpus=0.25)
NUMBERS = itertools.count()  # no two placement groups of a cluster may share a name
OVERRIDES = (
    "cluster.actors=1",
    "cluster.max_restarts=1",
    "cluster.start_timeout_s=120",
    "cluster.stop_timeout_s=60",
)


class LightLauncher(Launcher):
    """Launches workers without a model, and those of `actors` where they have the number.

    A learner is one of `learners`.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, "light")
        self.actors: dict[int, type] = {}
        self.learners: type = CountingWorker

    def launch(
        self, context: RunContext, name: str, *arguments: Any, incarnation: int
    ) -> GroupLaunch:
        kind, _, index = name.partition("-")
        worker: type = CountingWorker
        if kind == "actor":
            worker = self.actors.get(int(index), worker)
        elif kind == "learner":
            worker = self.learners

        def create(places: list[dict[str, Any]]) -> list[ray.actor.ActorHandle]:
            return [ray.remote(worker).options(max_concurrency=4, **places[0]).remote()]

        name = f"light-{next(NUMBERS)}"
        return GroupLaunch(name=name, claim=CLAIM, num_ranks=1, strategy="PACK", make=create)


class LightRun:
    """A supervisor, what it reported, and the registry of its replicas."""

    def __init__(self, *overrides: str, learners: type = CountingWorker) -> None:
        config = load_config("tasks/toy.toml", [*OVERRIDES, *overrides])
        self.launcher = LightLauncher(config)
        self.launcher.learners = learners
        self.registry = (
            ray.remote(ReplicaRegistry)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=2)
            .remote()
        )
        self.events: list[str] = []
        self.supervisor = Supervisor(
            config, self.launcher, context(config, self.registry), self.events.append
        )

    def until(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, self.events
            self.supervisor.tick()

    def pids(self) -> dict[str, int]:
        groups = self.supervisor.groups
        return {name: ray.get(group.leader.pid.remote()) for name, group in groups.items()}

    def roster(self) -> tuple[str, ...]:
        names: tuple[str, ...] = ray.get(self.registry.names.remote())
        return names

    def kill(self, name: str) -> None:
        group = self.supervisor.groups[name]
        ray.kill(group.leader)
        self.until(lambda: self.supervisor.groups[name] is not group)
        self.until(lambda: self.supervisor.settled)


def context(config: RunConfig, registry: Any) -> RunContext:
    unused: Any = None
    return RunContext(
        config=config,
        directory=RunDirectory("light"),
        namespace="",
        buffer=unused,
        source="",
        weight_store=registry,
        replica_registry=registry,
    )
