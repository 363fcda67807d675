"""The quarantine folder: nothing that was put in is lost, and no file grows without end."""

import math
from pathlib import Path

import numpy as np

from buffer.trajectory import pack
from learner.agreement.comparison import Comparison
from learner.agreement.quarantine import Quarantine, read_quarantine
from tests.learner_toy import make_trajectory


def outcome(number: int) -> Comparison:
    trajectory = make_trajectory("long", (1, 2, 2), policy_version=number, actor=f"a{number}")
    return Comparison(
        trajectory=trajectory,
        learner_version=number + 1,
        rms_nats=number / 8,
        mean_nats=-number / 4,
        log_q_token=np.arange(3, dtype=np.float32),
        log_q_stop=np.full(trajectory.stops.size, -number, dtype=np.float32),
    )


def versions(folder: Path) -> list[int]:
    return [kept.trajectory.policy_version for kept in read_quarantine(folder)]


def test_what_is_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    lost = Comparison(trajectory=make_trajectory("short", (2,)), learner_version=9)
    Quarantine(tmp_path).keep([outcome(5), lost])
    first, second = read_quarantine(tmp_path)
    assert pack(first.trajectory) == pack(outcome(5).trajectory)
    assert (first.learner_version, first.rms_nats, first.mean_nats) == (6, 0.625, -1.25)
    assert first.log_q_token.tolist() == [0, 1, 2]
    assert set(first.log_q_stop.tolist()) == {-5}
    assert pack(second.trajectory) == pack(lost.trajectory)
    assert math.isnan(second.rms_nats) and second.log_q_stop.size == 0


def test_files_are_bounded_and_nothing_is_lost(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, max_file_bytes=1000)
    for number in range(20):
        path = quarantine.keep([outcome(number)])
        assert path.exists() and path.stat().st_size <= 1000
    assert versions(tmp_path) == list(range(20))
    assert len(list(tmp_path.iterdir())) > 2


def test_of_too_many_files_the_first_and_the_newest_stay(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, max_file_bytes=1, max_files=4)
    for number in range(9):
        quarantine.keep([outcome(number)])
        assert len(list(tmp_path.iterdir())) <= 4
    assert versions(tmp_path) == [0, 6, 7, 8]


def test_nothing_is_created_before_there_is_something_to_keep(tmp_path: Path) -> None:
    Quarantine(tmp_path / "quarantine")
    assert not (tmp_path / "quarantine").exists()
    assert list(read_quarantine(tmp_path / "quarantine")) == []


def test_a_process_that_died_while_writing_costs_no_record_of_the_next(tmp_path: Path) -> None:
    path = Quarantine(tmp_path).keep([outcome(1), outcome(2)])
    path.write_bytes(path.read_bytes()[:-7])
    assert Quarantine(tmp_path).keep([outcome(3)]) != path
    assert versions(tmp_path) == [1, 3]
