"""Places on a real Ray cluster: taken by whole groups, shared in fractions, and given up."""

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util import placement_group_table

from cluster.config.file import load_config
from cluster.config.placement import ClusterConfig, GroupPlacement
from cluster.distributed import launcher
from cluster.distributed.launcher import GroupLaunch, Launcher
from cluster.distributed.reward_worker import RewardWorker
from cluster.distributed.worker import Member, RunContext
from cluster.distributed.worker_group import Phase, WorkerGroup
from reward.replica import ReplicaStats, RewardReplica
from tests.light_run import context
from tests.light_worker import LightWorker

pytestmark = pytest.mark.slow
HALF = GroupPlacement(cpus=0.5, gpus=0.5)


@pytest.fixture(scope="module", autouse=True)
def one_node() -> Iterator[None]:
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def group(name: str, *, num_ranks: int, start_timeout_s: float = 60.0) -> WorkerGroup:
    def create(places: list[dict[str, Any]]) -> list[ray.actor.ActorHandle]:
        worker = ray.remote(LightWorker)
        return [worker.options(max_concurrency=4, **place).remote() for place in places]

    launch = GroupLaunch(
        name=name, claim=HALF, num_ranks=num_ranks, strategy=HALF.strategy, make=create
    )
    config = ClusterConfig(start_timeout_s=start_timeout_s, silence_timeout_s=60.0)
    return WorkerGroup(name, launch, incarnation=0, config=config)


def poll_until(group: WorkerGroup, phase: Phase) -> None:
    deadline = time.monotonic() + 60
    while group.poll() is not phase:
        assert time.monotonic() < deadline, (group.phase, group.cause)
        time.sleep(0.05)


def held() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_places_are_shared_by_fractions_taken_whole_and_given_up() -> None:
    pair = group("pair", num_ranks=2)
    poll_until(pair, Phase.RUNNING)
    # The GPU is taken in halves, so another group finds no place, and its end says why.
    late = group("late", num_ranks=1, start_timeout_s=1.0)
    poll_until(late, Phase.FAILED)
    assert "late: no place within 1 s (cluster.start_timeout_s) for 0.5 CPU, 0.5 GPU" in late.cause
    assert "1 node with 2 CPU, 1 GPU; free in all: 1 CPU, 0 GPU" in late.cause
    late.kill()
    assert held() == 1
    # One that waits has its place as soon as the first has ended.
    next_one = group("next", num_ranks=1)
    assert next_one.poll() is Phase.PLACING
    pair.ask_to_stop()
    poll_until(pair, Phase.FINISHED)
    pair.kill()
    poll_until(next_one, Phase.RUNNING)
    # A group whose rank has died gives its place up with what is left of it.
    ray.kill(next_one.leader)
    poll_until(next_one, Phase.FAILED)
    next_one.kill()
    assert held() == 0


def test_a_reward_worker_says_how_it_is_while_scorings_hold_all_their_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Held(RewardReplica):
        """Never answers, and says how many ask."""

        def __init__(self) -> None:
            self.requests = itertools.count()
            self.asking = 0

        def score(self, items: Any) -> Any:
            self.asking = next(self.requests) + 1
            threading.Event().wait()

        def stats(self) -> ReplicaStats:
            return ReplicaStats(queued_requests=self.asking)

    class HeldWorker(RewardWorker):  # here, and not importable: it travels to Ray whole
        def __init__(self, context: RunContext, member: Member) -> None:
            super().__init__(context, member)
            self._replica = Held()

    monkeypatch.setattr(launcher, "RewardWorker", HeldWorker)
    config = load_config("tasks/toy.toml", [])
    launch = Launcher(config, "held").launch(context(config, None), "reward-0", incarnation=0)
    ray.get(launch.ready, timeout=60)
    (worker,) = launch.create()
    threads = HeldWorker.concurrency_groups["scoring"]
    scores = [worker.score.remote([]) for _ in range(threads + 8)]  # held while they run
    deadline = time.monotonic() + 180
    while ray.get(worker.status.remote(), timeout=180)["queued_requests"] < threads:
        assert time.monotonic() < deadline
    ray.get([worker.progress.remote(), worker.stop.remote()], timeout=60)
    assert not ray.wait(scores, timeout=0)[0]
    ray.kill(worker)
    launch.give_up()
