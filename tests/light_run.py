"""A supervisor over processes that have no model in them, on the Ray cluster that is joined."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.config.file import load_config
from cluster.config.schema import Placement, RunConfig
from cluster.distributed.launcher import Launch, Launcher
from cluster.distributed.placement import Place
from cluster.distributed.supervisor import Supervisor
from cluster.distributed.weight_store_worker import BoardWorker
from cluster.distributed.worker import RunContext
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

    def rollout_actor(self, context: RunContext, *, index: int, incarnation: int) -> Launch:
        return self._launch(self.actors.get(index, CountingWorker))

    def reward_replica(self, context: RunContext, *, index: int, incarnation: int) -> Launch:
        return self._launch(CountingWorker)

    def learner(self, context: RunContext, *, incarnation: int) -> Launch:
        return self._launch(self.learners)

    def _launch(self, worker: type) -> Launch:
        place = Place(f"light-{next(NUMBERS)}", CLAIM, num_ranks=1, strategy="PACK")

        def create() -> list[ray.actor.ActorHandle]:
            return [ray.remote(worker).options(max_concurrency=4, **place.options(0)).remote()]

        return Launch(place, create)


class LightRun:
    """A supervisor, what it reported, and what the board knows."""

    def __init__(self, *overrides: str, learners: type = CountingWorker) -> None:
        config = load_config("tasks/toy.toml", [*OVERRIDES, *overrides])
        self.launcher = LightLauncher(config)
        self.launcher.learners = learners
        self.board = (
            ray.remote(BoardWorker)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=2)
            .remote()
        )
        self.events: list[str] = []
        self.supervisor = Supervisor(
            config, self.launcher, context(config, self.board), self.events.append
        )

    def until(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, self.events
            self.supervisor.tick()

    def pids(self) -> dict[str, int]:
        gangs = self.supervisor.gangs
        return {name: ray.get(gang.leader.pid.remote()) for name, gang in gangs.items()}

    def roster(self) -> tuple[str, ...]:
        names: tuple[str, ...] = ray.get(self.board.replicas.remote())
        return names

    def kill(self, name: str) -> None:
        gang = self.supervisor.gangs[name]
        ray.kill(gang.leader)
        self.until(lambda: self.supervisor.gangs[name] is not gang)
        self.until(lambda: self.supervisor.settled)


def context(config: RunConfig, board: Any) -> RunContext:
    return RunContext(config=config, board=board, **dict.fromkeys(UNUSED, ""))  # type: ignore[arg-type]


UNUSED = (
    *("run", "checkpoints", "adapter", "quarantine", "namespace", "buffer_url"),
    *("buffer_password", "source"),
)
