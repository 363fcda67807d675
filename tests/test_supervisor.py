"""The supervisor on a real Ray cluster, with processes that have no model in them."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from cluster.board_worker import BoardWorker
from cluster.config import Placement, RunConfig
from cluster.config_file import load_config
from cluster.fit import DoesNotFit
from cluster.launch import Launch, Launcher
from cluster.place import Place
from cluster.scale_request import ScaleRefused
from cluster.supervisor import Supervisor
from cluster.workers import RunContext
from tests.light_worker import BrokenWorker, CountingWorker, DeafWorker

pytestmark = pytest.mark.slow
CLAIM = Placement(cpus=0.25)
OVERRIDES = (
    "cluster.actors=1",
    "cluster.max_restarts=1",
    "cluster.start_timeout_s=120",
    "cluster.stop_timeout_s=60",
)


@pytest.fixture(scope="module", autouse=True)
def one_node() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class LightLauncher(Launcher):
    """Launches workers without a model, and those of `actors` where they have the number."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.actors: dict[int, type] = {}

    def rollout_actor(self, context: RunContext, *, index: int, incarnation: int) -> Launch:
        return self._launch(self.actors.get(index, CountingWorker))

    def reward_replica(self, context: RunContext, *, index: int, incarnation: int) -> Launch:
        return self._launch(CountingWorker)

    def learner(self, context: RunContext, *, incarnation: int) -> Launch:
        return self._launch(CountingWorker)

    def _launch(self, worker: type) -> Launch:
        place = Place("light", CLAIM, num_ranks=1, strategy="PACK")

        def create() -> list[ray.actor.ActorHandle]:
            return [ray.remote(worker).options(max_concurrency=4, **place.options(0)).remote()]

        return Launch(place, create)


class Scene:
    """A supervisor, what it reported, and what the board knows."""

    def __init__(self, *overrides: str) -> None:
        config = load_config("tasks/toy.toml", [*OVERRIDES, *overrides])
        self.launcher = LightLauncher(config)
        self.board = ray.remote(BoardWorker).options(num_cpus=0).remote()
        self.events: list[str] = []
        self.supervisor = Supervisor(
            config, self.launcher, context(config, self.board), self.events.append
        )

    def until(self, holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
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


def test_a_run_grows_and_shrinks_around_the_parts_that_stay() -> None:
    scene = Scene()
    supervisor = scene.supervisor
    scene.until(lambda: supervisor.settled)
    first = scene.pids()
    assert set(first) == {"learner", "actor-0", "reward-0"}

    supervisor.scale(actors=3, replicas=2)
    assert supervisor.counts()["desired"] == {"actors": 3, "replicas": 2}
    assert supervisor.counts()["actual"] == {"actors": 1, "replicas": 1}
    scene.until(lambda: supervisor.settled)
    assert set(scene.roster()) == {"reward-0.0", "reward-1.0"}
    assert first.items() <= scene.pids().items()

    # The counters of one that leaves stay in the sums, its very last ones.
    supervisor.scale(actors=1, replicas=1)
    assert scene.roster() == ("reward-0.0",)  # before it is asked to stop
    scene.until(lambda: supervisor.settled)
    assert supervisor.counts()["actual"] == {"actors": 1, "replicas": 1}
    assert scene.pids() == first
    assert supervisor.actor_totals()["stopped"] == 2

    # Coming and going is not dying: `max_restarts` is untouched, and no name comes twice.
    for number in (2, 1, 2, 1, 2):
        supervisor.scale(replicas=number)
        scene.until(lambda: supervisor.settled)
    assert scene.roster() == ("reward-0.0", "reward-1.3")
    scene.kill("reward-1")
    assert scene.roster() == ("reward-0.0", "reward-1.4")

    with pytest.raises(DoesNotFit, match=r"the run needs 16\.5 CPU"):
        supervisor.scale(actors=62)
    assert supervisor.counts()["desired"] == {"actors": 1, "replicas": 2}
    assert supervisor.stop(10) == []
    assert not any("replacing" in event for event in scene.events if "reward-1" not in event)


def test_a_part_that_does_not_come_up_or_does_not_go_is_done_without() -> None:
    scene = Scene("cluster.stop_timeout_s=1")
    supervisor = scene.supervisor
    scene.until(lambda: supervisor.settled)
    scene.launcher.actors = {1: DeafWorker, 2: BrokenWorker}
    supervisor.scale(actors=3)
    scene.until(lambda: supervisor.settled)
    assert supervisor.counts()["desired"]["actors"] == 2
    assert supervisor.given_up == "actor-2: OSError: no such model; given up"
    assert supervisor.given_up in scene.events

    supervisor.scale(actors=1)
    assert supervisor.given_up == ""
    assert supervisor.counts()["actual"]["actors"] == 2  # it still runs
    scene.until(lambda: supervisor.settled)
    said = "actor-1 did not stop within 1 s (cluster.stop_timeout_s) and was killed"
    assert said in scene.events
    assert supervisor.counts()["actual"]["actors"] == 1
    # One that is asked for and not wanted any more at once leaves no trace.
    supervisor.scale(actors=2)
    supervisor.scale(actors=1)
    scene.until(lambda: supervisor.settled)
    assert supervisor.stop(10) == []


def test_a_run_without_actors_cannot_have_some() -> None:
    scene = Scene('learner.objective="sft"')
    with pytest.raises(ScaleRefused, match="this run has no actors"):
        scene.supervisor.scale(actors=2)
    scene.until(lambda: scene.supervisor.settled)
    assert scene.supervisor.stop(10) == []
