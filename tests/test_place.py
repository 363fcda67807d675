"""Places on a real Ray cluster: taken by whole gangs, shared in fractions, and given up."""

import time
from collections.abc import Iterator

import pytest
import ray
from ray.util import placement_group_table

from cluster.config.schema import GangPlacement
from cluster.distributed.launcher import Launch
from cluster.distributed.placement import Place
from cluster.distributed.worker_group import Gang, Phase
from tests.light_worker import LightWorker

pytestmark = pytest.mark.slow
HALF = GangPlacement(cpus=0.5, gpus=0.5)


@pytest.fixture(scope="module", autouse=True)
def one_node() -> Iterator[None]:
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def gang(name: str, *, num_ranks: int, start_timeout_s: float = 60.0) -> Gang:
    place = Place(name, HALF, num_ranks=num_ranks, strategy=HALF.strategy)

    def create() -> list[ray.actor.ActorHandle]:
        worker = ray.remote(LightWorker)
        ranks = range(num_ranks)
        return [worker.options(max_concurrency=4, **place.options(r)).remote() for r in ranks]

    launch = Launch(place, create)
    return Gang(
        name, launch, incarnation=0, start_timeout_s=start_timeout_s, silence_timeout_s=60.0
    )


def poll_until(gang: Gang, phase: Phase) -> None:
    deadline = time.monotonic() + 60
    while gang.poll() is not phase:
        assert time.monotonic() < deadline, (gang.phase, gang.cause)
        time.sleep(0.05)


def held() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_places_are_shared_by_fractions_taken_whole_and_given_up() -> None:
    pair = gang("pair", num_ranks=2)
    poll_until(pair, Phase.RUNNING)
    # The GPU is taken in halves, so another gang finds no place, and its end says why.
    late = gang("late", num_ranks=1, start_timeout_s=1.0)
    poll_until(late, Phase.FAILED)
    assert "late: no place within 1 s (cluster.start_timeout_s) for 0.5 CPU, 0.5 GPU" in late.cause
    assert "1 node with 2 CPU, 1 GPU; free in all: 1 CPU, 0 GPU" in late.cause
    late.kill()
    assert held() == 1
    # One that waits has its place as soon as the first has ended.
    next_one = gang("next", num_ranks=1)
    assert next_one.poll() is Phase.PLACING
    pair.ask_to_stop()
    poll_until(pair, Phase.FINISHED)
    pair.kill()
    poll_until(next_one, Phase.RUNNING)
    # A gang whose rank has died gives its place up with what is left of it.
    ray.kill(next_one.leader)
    poll_until(next_one, Phase.FAILED)
    next_one.kill()
    assert held() == 0
