"""The weight board."""

import pytest

from cluster.run.weight_store import StaleWeights, WeightBoard


def test_only_weights_newer_than_asked_for_are_handed_out() -> None:
    board = WeightBoard()
    assert board.newer_than(-1) is None
    board.publish(b"seven", version=7, checksum="c")
    assert board.newer_than(7) is None
    newest = board.newer_than(6)
    assert newest is not None
    assert (newest.version, newest.data, newest.checksum) == (7, b"seven", "c")


def test_a_version_never_names_two_sets_of_weights() -> None:
    board = WeightBoard()
    board.publish(b"seven", version=7, checksum="c")
    for version in (6, 7):
        with pytest.raises(StaleWeights, match=f"version {version} were offered"):
            board.publish(b"other", version=version, checksum="d")
    newest = board.newer_than(0)
    assert newest is not None and newest.data == b"seven"


def test_the_same_weights_may_be_published_again() -> None:
    board = WeightBoard()
    board.publish(b"seven", version=7, checksum="c")
    board.publish(b"seven", version=7, checksum="c")
    newest = board.newer_than(6)
    assert newest is not None and newest.data == b"seven"


def test_replicas_are_those_last_announced() -> None:
    board = WeightBoard()
    assert board.replicas() == ()
    board.announce_replicas(("reward-0.0", "reward-1.0"))
    board.announce_replicas(("reward-0.1", "reward-1.0"))
    assert board.replicas() == ("reward-0.1", "reward-1.0")
