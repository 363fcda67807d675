"""The orderly end of a run's parts: who is asked when, how long each has, and who was killed."""

from typing import Any

import pytest

from cluster.distributed import clients, shutdown
from cluster.distributed.clients import NobodyScores, RemoteScorer
from cluster.distributed.services import ReplicaRegistry
from cluster.distributed.shutdown import end_in_order
from cluster.distributed.worker_group import Phase

TIMEOUT_S = 0.8


class Clock:
    """Time that passes only while somebody sleeps, however busy the machine is."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLOCK, "now_s", 0.0)
    monkeypatch.setattr(shutdown, "time", CLOCK)


class Part:
    """A worker group without processes; `takes_s` is how long after a request it has ended."""

    def __init__(
        self, name: str, takes_s: float = 0.0, phase: Phase = Phase.RUNNING, dies: bool = False
    ) -> None:
        self.name, self.phase, self.cause = name, phase, f"{name}: died"
        self.asked_s: float | None = None
        self.ended_s: float | None = None
        self.killed = False
        self._takes_s, self._dies = takes_s, dies

    def poll(self) -> Phase:
        assert not self.killed, f"{self.name} has no processes any more"
        now = CLOCK.monotonic()
        if self._dies:
            self.phase = Phase.FAILED
        elif self.asked_s is not None and now - self.asked_s >= self._takes_s:
            self.phase = Phase.FINISHED
        if self.phase is not Phase.RUNNING and self.ended_s is None:
            self.ended_s = now
        return self.phase

    def ask_to_stop(self) -> None:
        assert self.phase is Phase.RUNNING and self.asked_s is None
        self.asked_s = CLOCK.monotonic()

    def kill(self) -> None:
        self.killed = True


def end(*parts: Any) -> tuple[list[str], list[str], float]:
    """Who is to be killed, what was reported, and how long it took."""
    reports: list[str] = []
    began = CLOCK.monotonic()
    killed = end_in_order(parts, timeout_s=TIMEOUT_S, report=reports.append, watch=lambda: None)
    return killed, reports, CLOCK.monotonic() - began


def test_replicas_are_asked_when_the_last_actor_has_ended() -> None:
    learner, replica = Part("learner", 0.3), Part("reward-0")
    actors = [Part("actor-0"), Part("actor-1", 0.15)]
    killed, reports, took_s = end(learner, *actors, replica)
    assert (killed, reports) == ([], []) and took_s < TIMEOUT_S
    assert replica.asked_s is not None and actors[1].ended_s is not None
    assert learner.ended_s is not None
    assert actors[1].ended_s <= replica.asked_s < learner.ended_s


@pytest.mark.parametrize("stuck", ["learner", "actor-0", "reward-0"])
def test_a_part_that_does_not_go_costs_no_other_its_end(stuck: str) -> None:
    parts = [
        Part(name, float("inf") if name == stuck else 0.1)
        for name in ("learner", "actor-0", "reward-0")
    ]
    killed, reports, took_s = end(*parts)
    assert (killed, reports) == ([stuck], [])
    assert TIMEOUT_S <= took_s < TIMEOUT_S + 0.1


def test_parts_that_do_not_run_are_ended_and_not_called_killed() -> None:
    phases = (Phase.PLACING, Phase.MEETING, Phase.STARTING)
    waiting = [Part(f"actor-{n}", phase=phase) for n, phase in enumerate(phases)]
    over = [Part("reward-0", phase=Phase.FAILED), Part("learner", phase=Phase.FINISHED)]
    killed, reports, took_s = end(*waiting, *over)
    assert (killed, reports) == ([], []) and took_s == 0
    assert all(part.killed and part.asked_s is None for part in waiting)
    assert not any(part.killed for part in over)  # the learner's last rows are still to be read


def test_one_that_dies_meanwhile_is_told_of() -> None:
    learner, replica = Part("learner", dies=True), Part("reward-0")
    killed, reports, _ = end(learner, replica)
    assert (killed, reports) == ([], ["learner: died; it was stopping"])
    assert replica.phase is Phase.FINISHED


def test_a_scoring_waits_for_a_replica_only_while_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "_POLL_S", 0.01)
    registry: Any = ReplicaRegistry()
    answers = iter([False, False, True])
    scorer = RemoteScorer(
        registry, namespace="", attempt_s=60, handover_s=60, stop=lambda: next(answers)
    )
    with pytest.raises(NobodyScores, match="no reward replica lives"):
        scorer.submit([])
    assert next(answers, None) is None
