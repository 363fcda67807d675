"""Figures that a person sees while a run goes on."""

import time

import pytest

from cluster.run.display import TIME_LEFT_S, TRAJECTORIES_PER_S
from cluster.run.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_rates_and_time_left_are_those_of_the_last_seconds(clock: list[float]) -> None:
    progress = Progress(steps=100, time_limit_s=None)
    progress.begin()
    progress.observe(trajectories=0, step=0)
    clock[0] += 10
    progress.observe(trajectories=500, step=20)
    shown = progress.shown(buffer_size=3)
    assert shown[TRAJECTORIES_PER_S] == pytest.approx(50)
    assert shown[TIME_LEFT_S] == pytest.approx(80 / 2)
    clock[0] += 30  # the old marks no longer count
    progress.observe(trajectories=500, step=20)
    clock[0] += 10
    progress.observe(trajectories=600, step=21)
    assert progress.shown(buffer_size=3)[TRAJECTORIES_PER_S] == pytest.approx(10)


def test_a_run_that_went_back_to_its_checkpoint_says_nothing_of_the_time_left(
    clock: list[float],
) -> None:
    progress = Progress(steps=100, time_limit_s=None)
    progress.begin()
    for step in (50, 48):
        progress.observe(trajectories=0, step=step)
        clock[0] += 5
    assert TIME_LEFT_S not in progress.shown(buffer_size=3)


def test_the_time_limit_counts_from_the_beginning_of_training(clock: list[float]) -> None:
    progress = Progress(steps=100, time_limit_s=60)
    clock[0] += 500
    assert not progress.time_is_up
    progress.begin()
    clock[0] += 59
    assert not progress.time_is_up
    assert progress.shown(buffer_size=0)[TIME_LEFT_S] == pytest.approx(1)
    clock[0] += 1
    assert progress.time_is_up


def test_shown_metrics_average_the_last_rows(clock: list[float]) -> None:
    progress = Progress(steps=100, time_limit_s=None)
    for step in range(1, 31):
        row = progress.row({"loss/value": float(step)}, step=step)
        assert row["step"] == step
    assert progress.shown(buffer_size=0)["loss/value"] == pytest.approx(25.5)
