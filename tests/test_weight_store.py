"""The weight store and the registry of reward replicas."""

import subprocess
import sys

import pytest

from cluster.distributed.services import ReplicaRegistry
from cluster.run.weight_store import StaleWeights, WeightStore


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
