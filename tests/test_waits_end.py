"""Waits of a driver end at their deadlines, and what was begun is still the run's to end."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from cluster.config.file import load_config
from cluster.distributed import clients, session, supervisor
from cluster.distributed.clients import RemoteScorer
from cluster.distributed.services import ReplicaRegistry
from cluster.distributed.waiting import PeerTimeout
from cluster.distributed.worker import RunContext
from cluster.distributed.worker_group import Phase, WorkerGroup
from cluster.run.directory import RunDirectory
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


class LostRegistry:
    """Answers no notice."""

    def __init__(self, registry: object, *, timeout_s: float) -> None:
        pass

    def announce(self, names: tuple[str, ...], *, wait: bool = True) -> None:
        raise PeerTimeout("replica registry: no answer")


class SilentRegistry(LostRegistry):
    """Hears every notice."""

    def announce(self, names: tuple[str, ...], *, wait: bool = True) -> None:
        """Nobody asks for them."""


class NoLauncher:
    """Worker groups without processes."""

    def _launch(self, run: RunContext, **_: int) -> object:
        reservation = SimpleNamespace(ready=None, give_up=lambda: None)
        return SimpleNamespace(reservation=reservation, create=list)

    rollout_actor = reward_replica = learner = _launch


def test_parts_that_could_not_be_withdrawn_are_still_the_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "RemoteRegistry", LostRegistry)
    monkeypatch.setattr(supervisor, "may_grow", lambda: True)
    config = load_config("tasks/toy.toml", ["cluster.actors=3"])
    launcher: Any = NoLauncher()
    run = supervisor.Supervisor(config, launcher, context(config, None), print)
    for group in run.groups.values():
        group.phase = Phase.RUNNING
    with pytest.raises(PeerTimeout):
        run.scale(actors=1)
    assert run.counts()["desired"]["actors"] == run.counts()["actual"]["actors"] == 3


class Told:
    """Keeps what Prometheus would be told of parts: name, incarnation, counters."""

    def __init__(self, run: str) -> None:
        self.parts: list[tuple[str, int, dict[str, float]]] = []

    def record_part(self, name: str, status: dict[str, float], *, incarnation: int) -> None:
        self.parts.append((name, incarnation, dict(status)))

    def record_run(self, *_: object) -> None:
        """Not of a part."""

    def of(self, name: str) -> list[tuple[int, dict[str, float]]]:
        return [(incarnation, status) for part, incarnation, status in self.parts if part == name]


def test_what_a_part_has_counted_at_last_is_told_when_it_has_left_or_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "RemoteRegistry", SilentRegistry)
    monkeypatch.setattr(supervisor, "Telemetry", Told)
    monkeypatch.setattr(supervisor, "may_grow", lambda: True)
    monkeypatch.setattr(WorkerGroup, "poll", lambda group: group.phase)
    launcher: Any = NoLauncher()
    config = load_config("tasks/toy.toml", ["cluster.actors=2"])
    run = supervisor.Supervisor(config, launcher, context(config, None), print)
    told: Any = run._telemetry
    stats: Any = None
    for group in run.groups.values():
        group.phase = Phase.RUNNING
    old = run.groups["actor-1"]
    run.scale(actors=1)
    run.scale(actors=2)  # the name comes again while the first still leaves
    old.status = {"tokens": 5.0}
    run.groups["actor-1"].status = {"tokens": 1.0}
    run.record_metrics({}, stats)
    # The living one has the last word, where a value of the moment is asked for.
    assert told.of("actor-1") == [(0, {"tokens": 5.0}), (1, {"tokens": 1.0})]

    told.parts.clear()
    old.status, old.phase = {"tokens": 7.0}, Phase.FINISHED
    died = run.groups["actor-0"]
    died.status, died.phase = {"tokens": 9.0}, Phase.FAILED
    run._clear_up("actor-0", died, ever_ran=True)
    run._let_go()
    assert told.of("actor-1") == [(0, {"tokens": 7.0})]
    assert told.of("actor-0") == [(0, {"tokens": 9.0})]
    assert run.actor_totals()["tokens"] == 7 + 1 + 9


def test_parts_that_do_not_run_leave_before_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RemoteRegistry", SilentRegistry)
    monkeypatch.setattr(supervisor, "may_grow", lambda: True)
    settings = ["cluster.actors=4", "reward.replicas=3"]
    launcher: Any = NoLauncher()
    config = load_config("tasks/toy.toml", settings)
    run = supervisor.Supervisor(config, launcher, context(config, None), print)
    for name, group in run.groups.items():
        down = name in ("reward-0", "actor-0", "actor-1")
        group.phase = Phase.STARTING if down else Phase.RUNNING
    run.scale(actors=2, replicas=1)
    # The first actor seeds the buffer: it stays.
    assert sorted(run.groups) == ["actor-0", "actor-2", "learner", "reward-1"]
    run.scale(replicas=2)
    assert "reward-0" in run.groups and run.counts()["actual"]["replicas"] == 2


class Clock:
    """Time that passes while somebody sleeps, and what happens meanwhile."""

    def __init__(self, happens: Callable[[float], None]) -> None:
        self.now_s = 0.0
        self._happens = happens

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self._happens(self.now_s)


def scorer_of(registry: Any, handover_s: float) -> RemoteScorer:
    return RemoteScorer(
        registry, namespace="", attempt_s=60, handover_s=handover_s, stop=lambda: False
    )


def test_a_scoring_waits_for_a_replica_that_comes_up_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry: Any = ReplicaRegistry()

    def come_up(now_s: float) -> None:
        if now_s > 1000:
            registry.announce(("reward-0.1",))

    score = SimpleNamespace(remote=lambda items: "scores")
    monkeypatch.setattr("ray.get_actor", lambda name, namespace: SimpleNamespace(score=score))
    monkeypatch.setattr(clients, "time", Clock(come_up))
    assert scorer_of(registry, 1200).submit([])._ref == "scores"

    monkeypatch.setattr(clients, "time", Clock(lambda now_s: None))
    with pytest.raises(PeerTimeout, match="none of 0 took a scoring within 1200 s"):
        scorer_of(ReplicaRegistry(), 1200).submit([])


def test_who_needs_a_part_waits_for_longer_than_it_may_take_to_come_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(session, "connect_ray", lambda *_: None)
    monkeypatch.setattr(session, "may_grow", lambda: True)
    monkeypatch.setattr(session.Launcher, "_service", lambda self, *_: None)
    monkeypatch.setattr(session.RaySession, "_check_service", lambda self, *_: None)
    config = load_config("tasks/toy.toml", ["cluster.start_timeout_s=900", "learner.ranks=2"])
    buffer = session.BufferAddress(url="", password=None)
    directory = RunDirectory("test", root=tmp_path)
    opened = session.RaySession(config, directory, buffer, address="10.0.0.1:6379")
    opened.open()
    told = opened._context.config
    place_and_start_s = 2 * 900
    assert told.actors.score_timeout_s > place_and_start_s  # for a replica
    assert told.actors.pace_timeout_s > place_and_start_s  # for the learner
    assert told.learner.starvation_timeout_s > place_and_start_s  # for actors and replicas
    assert told.learner.collective_timeout_s > told.learner.starvation_timeout_s
