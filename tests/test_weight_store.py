"""The weight store and the registry of reward replicas."""

import subprocess
import sys
import time
from collections.abc import Callable
from threading import Event
from typing import cast

import pytest

from actors.weight_sources import FetchedAhead, PublishedWeights
from cluster.config.file import load_config
from cluster.distributed.learner_worker import BackgroundPublisher, LearnerWorker
from cluster.distributed.services import ReplicaRegistry
from cluster.run.weight_store import StaleWeights, WeightStore
from learner.learner import Learner


def test_only_weights_newer_than_asked_for_are_handed_out() -> None:
    store = WeightStore[bytes]()
    assert store.newer_than(-1) is None
    store.publish(b"seven", version=7, checksum="c")
    assert store.newer_than(7) is None
    newest = store.newer_than(6)
    assert newest is not None
    assert (newest.version, newest.data, newest.checksum) == (7, b"seven", "c")


def test_a_version_never_names_two_sets_of_weights() -> None:
    store = WeightStore[bytes]()
    store.publish(b"seven", version=7, checksum="c")
    for version in (6, 7):
        with pytest.raises(StaleWeights, match=f"version {version} were offered"):
            store.publish(b"other", version=version, checksum="d")
    newest = store.newer_than(0)
    assert newest is not None and newest.data == b"seven"


def test_the_same_weights_may_be_published_again() -> None:
    store = WeightStore[bytes]()
    store.publish(b"seven", version=7, checksum="c")
    store.publish(b"seven", version=7, checksum="c")
    newest = store.newer_than(6)
    assert newest is not None and newest.data == b"seven"


def test_the_registry_has_the_replicas_that_were_announced_last() -> None:
    registry = ReplicaRegistry()
    assert registry.names() == ()
    registry.announce(("reward-0.0", "reward-1.0"))
    registry.announce(("reward-0.1", "reward-1.0"))
    assert registry.names() == ("reward-0.1", "reward-1.0")


def test_the_processes_of_services_import_no_torch() -> None:
    code = (
        "import sys, cluster.distributed.services;"
        "sys.exit(bool({'torch', 'transformers', 'redis'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100, check=False).returncode == 0


class SlowStore(WeightStore[bytes]):
    """Hands nothing out and takes nothing while it is held up; fails where it is to."""

    def __init__(self) -> None:
        super().__init__()
        self.goes, self.begun = Event(), Event()
        self.taken: list[int] = []
        self.error: Exception | None = None

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        self._wait()
        super().publish(data, version=version, checksum=checksum)
        self.taken.append(version)

    def newer_than(self, version: int) -> PublishedWeights | None:
        self._wait()
        return super().newer_than(version)

    def _wait(self) -> None:
        self.begun.set()
        assert self.goes.wait(30)
        if self.error is not None:
            raise self.error


def test_a_learner_does_not_wait_for_its_publications_and_the_last_one_arrives() -> None:
    store = SlowStore()
    publisher = BackgroundPublisher(store)
    began = time.monotonic()
    publisher.publish(b"", version=1, checksum="c")
    assert store.begun.wait(30)
    for version in (2, 3, 4):  # while the first is under way
        publisher.publish(b"", version=version, checksum="c")
    assert time.monotonic() - began < 15 and store.taken == []
    store.goes.set()
    publisher.finish()
    assert store.taken == [1, 4]
    publisher.publish(b"", version=5, checksum="c")
    publisher.finish()
    assert store.taken == [1, 4, 5]


def test_a_publication_that_failed_is_an_error_of_the_next_or_of_the_end() -> None:
    store = SlowStore()
    store.goes.set()
    store.error = StaleWeights("other weights")
    publisher = BackgroundPublisher(store)
    publisher.publish(b"", version=1, checksum="c")
    with pytest.raises(StaleWeights):
        publisher.finish()
    publisher.publish(b"", version=2, checksum="c")
    publisher._sent[0].exception(30)
    with pytest.raises(StaleWeights):
        publisher.publish(b"", version=3, checksum="c")


def test_a_publication_that_failed_ends_a_wait_for_groups() -> None:
    store = SlowStore()
    store.error = StaleWeights("other weights")
    worker = object.__new__(LearnerWorker)
    worker._config = load_config("tasks/toy.toml")
    worker._stopping = Event()
    worker._publisher = BackgroundPublisher(store)
    worker._publisher.publish(b"", version=1, checksum="c")

    class Waiting:
        def run(self, _: int, stop: Callable[[], bool], __: object) -> None:
            assert not stop()  # it is under way
            store.goes.set()
            worker._publisher._sent[0].exception(30)
            assert stop(), "a learner that waits for groups did not hear of it"

    worker._learner = cast(Learner, Waiting())
    with pytest.raises(StaleWeights):
        worker.run()


def test_weights_are_fetched_while_the_actor_samples() -> None:
    store = SlowStore()
    WeightStore.publish(store, b"one", version=1, checksum="c")
    weights = FetchedAhead(store, patience_s=0.01)
    assert weights.newer_than(0) is None  # they are on their way
    store.goes.set()
    assert asked(weights, 0) == 1
    patient = FetchedAhead(store, patience_s=30.0)
    assert asked(patient, 0) == asked(patient, 0) == 1
    for version in (2, 3):
        store.publish(b"", version=version, checksum="c")
        assert asked(patient, version - 1) == version  # as new as there are
    began = time.monotonic()
    assert patient.newer_than(3) is None  # a look that finds nothing is the end of the wait
    assert time.monotonic() - began < 15
    store.error = ConnectionError("store is gone")
    with pytest.raises(ConnectionError, match="gone"):
        patient.newer_than(3)
    store.error = None
    assert patient.newer_than(3) is None


def asked(weights: FetchedAhead, version: int) -> int:
    """The version that there is for somebody who has another."""
    deadline = time.monotonic() + 30
    while (fresh := weights.newer_than(version)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return fresh.version
