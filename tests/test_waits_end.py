"""Waits of a driver end at their deadlines, and what was begun is still the run's to end."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from cluster import session, supervisor
from cluster.config_file import load_config
from cluster.gang import Phase
from cluster.waiting import PeerTimeout
from cluster.workers import RunContext
from tests.light_run import context


def test_an_evaluation_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(_: object, *, timeout: float) -> None:
        raise GetTimeoutError

    killed: list[str] = []
    monkeypatch.setattr("ray.wait", lambda refs, timeout: ([], refs))
    monkeypatch.setattr("ray.kill", killed.append)
    monkeypatch.setattr("ray.get", no_answer)
    monkeypatch.setattr(session, "room", lambda: "free in all: 0 CPU")
    ref: Any = None
    pending = session.RemoteMeasurement("worker", ref, "evaluator-1")
    assert not pending.done()
    pending._deadline -= session.EVALUATION_TIMEOUT_S
    assert pending.done()
    with pytest.raises(PeerTimeout, match=r"evaluator-1: no answer .* within 3600 s; free in all"):
        pending.result()
    assert killed == ["worker"]


class LostBoard:
    """Answers no notice."""

    def __init__(self, board: object, *, timeout_s: float) -> None:
        pass

    def announce_replicas(self, names: tuple[str, ...]) -> None:
        raise PeerTimeout("weight board: no answer")

    def remind_of_replicas(self, names: tuple[str, ...]) -> None:
        """Nobody waits."""


class SilentBoard(LostBoard):
    """Hears every notice."""

    def announce_replicas(self, names: tuple[str, ...]) -> None:
        """Nobody asks for them."""


class NoLauncher:
    """Gangs without processes."""

    def _launch(self, run: RunContext, **_: int) -> object:
        place = SimpleNamespace(ready=None, give_up=lambda: None)
        return SimpleNamespace(place=place, create=list)

    rollout_actor = reward_replica = learner = _launch


def test_parts_that_could_not_be_withdrawn_are_still_the_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "RemoteBoard", LostBoard)
    monkeypatch.setattr(supervisor, "may_grow", lambda: True)
    config = load_config("tasks/toy.toml", ["cluster.actors=3"])
    launcher: Any = NoLauncher()
    run = supervisor.Supervisor(config, launcher, context(config, None), print)
    for gang in run.gangs.values():
        gang.phase = Phase.RUNNING
    with pytest.raises(PeerTimeout):
        run.scale(actors=1)
    assert run.counts()["desired"]["actors"] == run.counts()["actual"]["actors"] == 3


def test_parts_that_do_not_run_leave_before_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RemoteBoard", SilentBoard)
    monkeypatch.setattr(supervisor, "may_grow", lambda: True)
    settings = ["cluster.actors=4", "reward.replicas=3"]
    launcher: Any = NoLauncher()
    config = load_config("tasks/toy.toml", settings)
    run = supervisor.Supervisor(config, launcher, context(config, None), print)
    for name, gang in run.gangs.items():
        down = name in ("reward-0", "actor-0", "actor-1")
        gang.phase = Phase.STARTING if down else Phase.RUNNING
    run.scale(actors=2, replicas=1)
    # The first actor seeds the buffer: it stays.
    assert sorted(run.gangs) == ["actor-0", "actor-2", "learner", "reward-1"]
    run.scale(replicas=2)
    assert "reward-0" in run.gangs and run.counts()["actual"]["replicas"] == 2
