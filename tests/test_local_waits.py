"""A run in one process: its loops heed a stop and have a deadline, and errors damage nothing."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from buffer.replay import BufferStarved, DrawRequest
from cluster.config.file import load_config
from cluster.run import local
from cluster.run.local import LocalRun, RollingReplay

LIMIT_S = 100.0


class Clock:
    """Seconds that pass only by `roll_out`."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(local, "monotonic", clock)
    return clock


def run_of(clock: Clock, depths: Any, learner: Any) -> tuple[LocalRun, list[float]]:
    """A run whose buffer has these depths one after the other; when it rolled out."""
    run: Any = LocalRun.__new__(LocalRun)
    rolled: list[float] = []

    def roll_out() -> None:
        rolled.append(clock.now_s)
        clock.now_s += 30.0

    run._config = load_config(
        "tasks/toy.toml", [f"learner.starvation_timeout_s={LIMIT_S}", "learner.groups_per_step=4"]
    )
    run._groups_per_step, run._stop, run._damaged = 4, lambda: False, False
    run._actor = SimpleNamespace(step=roll_out, flush=lambda: None)
    run._buffer = SimpleNamespace(depth=lambda: next(depths))
    run._learner, run._replica, run._adapter, run._base = learner, None, None, None
    run._deepest, run._progressed_s, run.learner_rows = 0, 0.0, []
    run._memory = None
    return run, rolled


def test_a_tick_rolls_out_once_so_that_a_stop_is_heeded_between_two(clock: Clock) -> None:
    learner = SimpleNamespace(step=lambda stop: {"loss": 1.0}, checkpoint_when_due=lambda: None)
    run, rolled = run_of(clock, iter([0, 2, 4]), learner)
    run.tick()
    run.tick()
    assert len(rolled) == 2 and run.learner_rows == []
    run.tick()
    assert len(rolled) == 2 and run.learner_rows == [{"loss": 1.0}]


def test_groups_that_never_become_enough_end_the_run_at_its_deadline(clock: Clock) -> None:
    depths = iter([1, 1, 2, 2, 2, 2, 2, 2, 2, 2])
    run, rolled = run_of(clock, depths, None)
    with pytest.raises(BufferStarved, match=r"at most 2 groups for 100 s .*fresh_capacity"):
        while True:
            run.tick()
    # From the last progress on: it had two groups after 60 s.
    assert rolled[-1] == 60.0 + 90.0


def test_a_draw_heeds_a_stop(clock: Clock) -> None:
    class Empty:
        def draw(self, request: DrawRequest) -> None:
            raise BufferStarved

    empty: Any = Empty()
    rolled: list[None] = []
    replay = RollingReplay(empty, lambda: rolled.append(None))
    request = DrawRequest(
        num_groups=1,
        num_replayed=0,
        version=0,
        rng=np.random.default_rng(0),
        timeout_s=LIMIT_S,
        stop=lambda: len(rolled) == 3,
    )
    assert replay.draw(request) == [] and len(rolled) == 3


def test_after_an_error_in_a_step_the_last_checkpoint_stays_the_newest(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    monkeypatch.setattr(local.assembly, "save_result", lambda *_: saved.append("adapter"))

    def diverge(stop: object) -> None:
        raise ArithmeticError("the gradient is not finite")

    learner = SimpleNamespace(
        step=diverge,
        checkpoint=lambda: saved.append("checkpoint"),
        checkpoint_when_due=lambda: None,
    )
    run, _ = run_of(clock, iter([4, 4]), learner)
    with pytest.raises(ArithmeticError):
        run.tick()
    run.stop(1.0)
    assert saved == []
    learner.step = lambda stop: {}
    run.tick()
    run.stop(1.0)
    assert saved == ["checkpoint", "adapter"]
