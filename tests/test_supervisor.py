"""The supervisor on a real Ray cluster, with processes that have no model in them."""

from collections.abc import Iterator

import pytest
import ray

from cluster.config.project import UserError
from learner.broadcast import Unrecoverable
from reward.verifiers import CheckFailed
from tests.light_failures import LastWords
from tests.light_run import LightRun
from tests.light_worker import BrokenWorker, DeafWorker, UnjudgedWorker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_node() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_run_grows_and_shrinks_around_the_parts_that_stay() -> None:
    light = LightRun()
    supervisor = light.supervisor
    light.until(lambda: supervisor.settled)
    first = light.pids()
    assert set(first) == {"learner", "actor-0", "reward-0"}

    supervisor.scale(actors=3, replicas=2)
    assert supervisor.counts()["desired"] == {"actors": 3, "replicas": 2}
    assert supervisor.counts()["actual"] == {"actors": 1, "replicas": 1}
    light.until(lambda: supervisor.settled)
    assert set(light.roster()) == {"reward-0.0", "reward-1.0"}
    assert first.items() <= light.pids().items()

    # The counters of one that leaves stay in the sums, its very last ones.
    supervisor.scale(actors=1, replicas=1)
    assert light.roster() == ("reward-0.0",)  # before it is asked to stop
    light.until(lambda: supervisor.settled)
    assert supervisor.counts()["actual"] == {"actors": 1, "replicas": 1}
    assert light.pids() == first
    assert supervisor.actor_totals()["stopped"] == 2

    # Coming and going is not dying: `max_restarts` is untouched, and no name comes twice.
    for number in (2, 1, 2, 1, 2):
        supervisor.scale(replicas=number)
        light.until(lambda: supervisor.settled)
    assert light.roster() == ("reward-0.0", "reward-1.3")
    light.kill("reward-1")
    assert light.roster() == ("reward-0.0", "reward-1.4")

    # A registry that Ray has started again knows nothing until it is told.
    ray.kill(light.registry, no_restart=False)
    light.until(lambda: light.roster() == ("reward-0.0", "reward-1.4"))

    with pytest.raises(UserError, match=r"the run needs 16\.25 CPU"):
        supervisor.scale(actors=62)
    assert supervisor.counts()["desired"] == {"actors": 1, "replicas": 2}
    assert supervisor.stop(10) == []
    assert not any("replacing" in event for event in light.events if "reward-1" not in event)


def test_a_part_that_does_not_come_up_or_does_not_go_is_done_without() -> None:
    light = LightRun("cluster.stop_timeout_s=1")
    supervisor = light.supervisor
    light.until(lambda: supervisor.settled)
    light.launcher.actors = {1: DeafWorker, 2: BrokenWorker}
    supervisor.scale(actors=3)
    light.until(lambda: supervisor.settled)
    assert supervisor.counts()["desired"]["actors"] == 2
    assert supervisor.given_up == "actor-2: OSError: no such model; given up"
    assert supervisor.given_up in light.events

    supervisor.scale(actors=1)
    assert supervisor.given_up == ""
    assert supervisor.counts()["actual"]["actors"] == 2  # it still runs
    light.until(lambda: supervisor.settled)
    said = "actor-1 did not stop within 1 s (cluster.stop_timeout_s) and was killed"
    assert said in light.events
    assert supervisor.counts()["actual"]["actors"] == 1
    # One that is asked for and not wanted any more at once leaves no trace.
    supervisor.scale(actors=2)
    supervisor.scale(actors=1)
    light.until(lambda: supervisor.settled)
    assert supervisor.stop(10) == []


def test_a_run_without_actors_cannot_have_some() -> None:
    light = LightRun('learner.objective="sft"')
    with pytest.raises(UserError, match="this run has no actors"):
        light.supervisor.scale(actors=2)
    light.until(lambda: light.supervisor.settled)
    assert light.supervisor.stop(10) == []


def test_what_a_learner_has_to_say_is_heard_when_it_fails() -> None:
    light = LightRun(learners=LastWords)
    with pytest.raises(Unrecoverable, match="no use"):
        light.until(lambda: False)
    assert light.supervisor.learner_rows == [{"progress/step": 1.0}]
    assert "learner: it does not look good" in light.events
    assert light.supervisor.stop(10) == []


def test_an_actor_whose_verifier_fails_always_ends_the_run_with_its_words() -> None:
    light = LightRun()
    light.until(lambda: light.supervisor.settled)
    light.launcher.actors = {1: UnjudgedWorker}
    light.supervisor.scale(actors=2)
    with pytest.raises(CheckFailed, match="8 of 8 checks failed"):
        light.until(lambda: False)
    assert not any("replacing" in event for event in light.events)
    assert light.supervisor.stop(10) == []
