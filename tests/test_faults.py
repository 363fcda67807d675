"""The fault bench counts what is lost and what is there twice; a fault that is played is a row."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bench.audit import Contents, contents_of
from bench.fault_matrix import trial
from bench.fault_matrix.job import Job
from bench.fault_matrix.ledger import duplicated, evidence, lost, offered
from bench.fault_matrix.strikes import PARTS, Arsenal, Strike
from bench.faults import DISKS, NODES, PROCESSES
from buffer.config import BufferConfig
from buffer.memory import MemoryStore
from buffer.replay import ReplayBuffer


@pytest.fixture
def contents() -> Contents:
    """A buffer with five trajectories, two of which wait as a group of their own too."""
    store = MemoryStore()
    buffer = ReplayBuffer(store, config=BufferConfig())
    for number in range(3):
        buffer.seed([evidence(number)])
    for number in (3, 4):
        buffer.add([replace(evidence(number), actor="actor-0")])
    return contents_of(store)


def without(mapping: Any, key: Any) -> dict[Any, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def counted(contents: Contents, **more: int) -> Contents:
    meta = dict(contents.meta)
    for name, number in more.items():
        meta[name] = meta.get(name, 0) + number
    return replace(contents, meta=meta)


def test_what_is_still_there_is_not_lost(contents: Contents) -> None:
    assert offered(contents) == 5
    assert lost(contents, contents, witnessed=contents.payload.keys()) == 0


def test_what_a_witness_stored_must_be_there(contents: Contents) -> None:
    assert lost(contents, contents, witnessed=[evidence(0).id, evidence(7).id]) == 1


def test_only_what_was_counted_as_taken_out_may_be_gone(contents: Contents) -> None:
    gone = replace(contents, payload=without(contents.payload, evidence(3).id))
    indexes = lost(gone, gone, witnessed=())  # which still name it
    assert lost(contents, gone, witnessed=()) == indexes + 1
    explained = counted(gone, evicted_quota=1)
    assert lost(contents, explained, witnessed=()) == lost(explained, explained, witnessed=())
    refused = counted(gone, near_rejected=1)  # never had a place that could be empty now
    assert lost(contents, refused, witnessed=()) == lost(refused, refused, witnessed=()) + 1


def test_a_group_that_vanishes_undrawn_is_lost(contents: Contents) -> None:
    first = min(contents.groups)
    gone = replace(contents, groups=without(contents.groups, first))
    assert lost(contents, gone, witnessed=()) == lost(gone, gone, witnessed=()) + 1
    drawn = counted(gone, groups_exhausted=1)
    assert lost(contents, drawn, witnessed=()) == lost(drawn, drawn, witnessed=())


def test_a_buffer_that_went_back_has_lost_what_it_forgot(contents: Contents) -> None:
    earlier = counted(contents, offered=-2)
    assert lost(contents, earlier, witnessed=()) == lost(earlier, earlier, witnessed=()) + 2


def test_groups_and_versions_that_come_again_are_duplicates() -> None:
    assert duplicated({b"one": {1}, b"other": {2}}, [1, 2, 3]) == 0
    assert duplicated({b"one": {1, 5, 9}, b"other": {2}}, [1, 2, 2, 3]) == 3


def test_every_part_is_killed_and_stopped() -> None:
    assert {(part, fault) for part in PARTS for fault in ("SIGKILL", "SIGSTOP")} == {
        *PROCESSES,
        *NODES,
    }
    assert {part for part, _ in DISKS} == {"Redis", "driver"}


class FailingJob(Job):
    """A run that a fault ends with an error, or leaves without a part, until it is resumed."""

    def __init__(self, log: Path, status: int | None) -> None:
        log.write_text("all is well\n")
        self.log = log
        self.process: Any = SimpleNamespace(poll=lambda: status, returncode=status)
        self.resumed = False

    def wait_until_stepping(self) -> None:
        """It always does."""

    def resume(self) -> None:
        self.resumed = True

    def state(self) -> None:
        return None

    def steps(self) -> int:
        return 7

    def processes(self, word: str) -> list[psutil.Process]:
        return []


@pytest.mark.parametrize(
    ("status", "said", "ended"),
    [
        (1, "amortize train: no space left\n", "amortize train: no space left; --resume went on"),
        (-9, "", "killed (-9); --resume went on"),
        (None, "", "not whole again within 0 s"),
    ],
)
def test_no_row_is_without_an_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int | None, said: str, ended: str
) -> None:
    job, over = FailingJob(tmp_path / "log", status), []

    def strike(*_: object) -> Strike:
        with job.log.open("a") as log:
            log.write(said)
        return Strike(1000.0, lambda: over.append("over"))

    monkeypatch.setattr(trial, "strike", strike)
    monkeypatch.setattr(trial, "RECOVERY_S", 0.0)
    books: Any = SimpleNamespace(look=lambda: SimpleNamespace(meta={}), judge=lambda before: (0, 0))
    row = trial.measure(job, books, "Redis", "full disk", Arsenal())
    assert row.ended == ended and job.resumed and over == ["over"]
    assert (row.recovered_s is None) == (status is None)
