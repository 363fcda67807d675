"""Waits of a driver end at their deadlines, and what was begun is still the run's to end."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayActorError

from cluster.config.file import load_config
from cluster.config.project import UserError
from cluster.config.schema import ClusterConfig
from cluster.distributed import clients, measurement, services, supervisor, worker_group
from cluster.distributed.clients import RemoteScorer
from cluster.distributed.services import ReplicaRegistry, ServiceWatch
from cluster.distributed.waiting import PeerDied, PeerTimeout
from cluster.distributed.worker import Member, RunContext, Worker
from cluster.distributed.worker_group import Phase, WorkerGroup
from cluster.run import awake
from cluster.run.awake import AwakeClock
from tests.light_run import context


class Evaluator:
    """Stands for a worker group that evaluates; `phases` are what it is found in, one by one."""

    made: ClassVar[list["Evaluator"]] = []

    def __init__(self, name: str, launch: Any, *, incarnation: int, config: object) -> None:
        self.phases = iter(launch)
        self.incarnation, self.cause = incarnation, f"{name}: no answer to status"
        self.phase = Phase.PLACING
        self.status: dict[str, Any] = {"stages": 0}
        self.error: Exception | None = None
        self.result: dict[str, str] | None = None
        self.killed = False
        self.made.append(self)

    def poll(self) -> Phase:
        self.phase = next(self.phases, self.phase)
        if self.phase is Phase.FINISHED:
            self.status = self.result = {"evaluation": "figures"}
        return self.phase

    def kill(self) -> None:
        self.killed = True


def measuring(
    monkeypatch: pytest.MonkeyPatch, *lives: list[Phase]
) -> tuple[measurement.RemoteMeasurement, list[str]]:
    """An evaluation whose processes are found in these phases, and what is reported of it."""
    monkeypatch.setattr(measurement, "WorkerGroup", Evaluator)
    monkeypatch.setattr(Evaluator, "made", [])
    events: list[str] = []
    launch: Any = lambda incarnation: lives[incarnation]  # noqa: E731
    config = ClusterConfig(max_restarts=1)
    return measurement.RemoteMeasurement("evaluator-1", launch, config, events.append), events


def test_an_evaluation_that_makes_no_progress_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pending, _ = measuring(monkeypatch, [Phase.RUNNING])
    assert not pending.done()
    pending._progressed_s -= measurement.STAGE_TIMEOUT_S + 1
    Evaluator.made[0].status = {"stages": 1}  # the next stage has its own time
    assert not pending.done()
    pending._progressed_s -= measurement.STAGE_TIMEOUT_S + 1
    assert pending.done()
    with pytest.raises(PeerTimeout, match=r"evaluator-1: no progress of its evaluation .* 3600 s"):
        pending.result()
    assert Evaluator.made[0].killed


def test_each_stage_is_told_and_the_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pending, _ = measuring(monkeypatch, [Phase.RUNNING, Phase.RUNNING, Phase.FINISHED])
    told: list[str] = []
    pending.progress = told.append
    Evaluator.made[0].status = {"stages": 2, "stage": "drawing"}
    assert [pending.done() for _ in range(3)] == [False, False, True]
    assert told == ["evaluator-1: drawing"]


def test_an_evaluator_without_a_place_waits_until_the_other_parts_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measuring(monkeypatch, [Phase.PLACING])
    events: list[str] = []
    over: list[bool] = []
    lives = [[Phase.FAILED], [Phase.RUNNING, Phase.FINISHED]]
    for beside in (True, False):
        launch: Any = iter(lives[1 - beside :]).__next__
        over.clear()
        events.clear()
        pending = measurement.RemoteMeasurement(
            "evaluator-1",
            lambda _: launch(),  # noqa: B023
            ClusterConfig(max_restarts=0),
            events.append,
            beside,
            lambda: bool(over),
        )
        assert not any(pending.done() for _ in range(5))
        assert events == [
            "no place for evaluator-1 beside the other parts: it waits until they end"
        ]
        over.append(True)
        assert pending.result() == "figures"


def test_an_evaluator_that_dies_or_falls_silent_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dies, lives = [Phase.RUNNING, Phase.FAILED], [Phase.RUNNING, Phase.FINISHED]
    pending, events = measuring(monkeypatch, dies, lives)
    assert pending.result() == "figures"
    assert events == ["evaluator-1: no answer to status; replacing it"]
    assert all(evaluator.killed for evaluator in Evaluator.made)

    pending, _ = measuring(monkeypatch, dies, dies)
    with pytest.raises(PeerDied, match="evaluator-1: no answer to status"):
        pending.result()

    # A mistake that a new process would only repeat is raised as it is.
    pending, events = measuring(monkeypatch, dies)
    Evaluator.made[0].error = KeyError("no such file")
    with pytest.raises(KeyError, match="no such file"):
        pending.result()
    assert events == []


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

    def launch(self, run: RunContext, name: str, *, incarnation: int) -> object:
        return SimpleNamespace(ready=None, give_up=lambda: None, create=list)


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
    with pytest.raises(UserError, match="replica registry: no answer"):
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


def test_a_replica_is_late_only_where_it_comes_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry: Any = ReplicaRegistry()
    registry.announce(("reward-0.0",))
    clock, scores_until_s, asked_s = Clock(lambda now_s: None), 1000.0, []

    def wait(ref: str, *, timeout_s: float, **_: object) -> dict[str, float]:
        if ref == "status":
            asked_s.append(clock.now_s)
            return {"unmoved_s": max(5.0, clock.now_s - scores_until_s)}
        clock.sleep(timeout_s)
        raise PeerTimeout("no answer")

    handle = SimpleNamespace(
        score=SimpleNamespace(remote=lambda items: "scores"),
        status=SimpleNamespace(remote=lambda: "status"),
    )
    monkeypatch.setattr("ray.get_actor", lambda name, namespace: handle)
    monkeypatch.setattr(clients, "time", clock)
    monkeypatch.setattr(clients, "wait_for", wait)
    scorer = scorer_of(registry, 30)
    with pytest.raises(PeerTimeout, match="no answer"):
        scorer.submit([]).result(100)
    # It scored for long beyond the deadline of 100 s, which then ran from its last sign.
    assert 1090 <= clock.now_s <= 1110 and asked_s[0] == 60
    assert scorer.retries == 1  # after the 60 s that one replica has to come further


def scoring_of(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, status: Callable[[], float], *, ready: float
) -> clients.RemoteScores:
    """A scoring that is answered at `ready`, by a replica that says `status` of its progress."""
    registry: Any = ReplicaRegistry()
    registry.announce(("reward-0.0",))

    def wait(ref: str, *, timeout_s: float, **_: object) -> object:
        if ref == "status":
            return {"unmoved_s": status()}
        clock.sleep(min(timeout_s, max(ready - clock.now_s, 0.0)))
        if clock.now_s < ready:
            raise PeerTimeout("no answer")
        return "answer"

    handle = SimpleNamespace(
        score=SimpleNamespace(remote=lambda items: "scores"),
        status=SimpleNamespace(remote=lambda: "status"),
    )
    monkeypatch.setattr("ray.get_actor", lambda name, namespace: handle)
    monkeypatch.setattr(
        "ray.wait", lambda refs, **_: (refs, []) if clock.now_s >= ready else ([], refs)
    )
    monkeypatch.setattr(clients, "time", clock)
    monkeypatch.setattr(clients, "wait_for", wait)
    return scorer_of(registry, 30).submit([])


def test_a_late_scoring_is_awaited_aside_while_its_replica_comes_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(lambda now_s: None)
    asked_s: list[float] = []

    def status() -> float:
        asked_s.append(clock.now_s)
        return 10.0 if clock.now_s < 150 else 60.0

    scores = scoring_of(monkeypatch, clock, status, ready=1000)
    while not scores.done():
        clock.sleep(1.0)
    assert asked_s == [61, 112, 163]  # 60 s from its start, then from each sign of progress
    clock.sleep(1000)
    assert scores.done() and len(asked_s) == 3  # an answer needs no question


def test_a_replica_that_does_not_say_how_far_it_is_counts_as_busy_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def status() -> float:
        raise PeerTimeout("reward replica reward-0.0: no answer to status")

    clock = Clock(lambda now_s: None)
    scores = scoring_of(monkeypatch, clock, status, ready=250)
    answer: Any = scores.result(300)
    assert answer == "answer" and scores._scorer.retries == 0

    clock = Clock(lambda now_s: None)
    scores = scoring_of(monkeypatch, clock, status, ready=1000)
    with pytest.raises(PeerTimeout, match="no answer"):
        scores.result(300)
    assert 300 <= clock.now_s <= 310


def test_a_replica_whose_name_is_gone_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda now_s: None)
    scores = scoring_of(monkeypatch, clock, lambda: 0.0, ready=1000)

    def nobody(name: str, namespace: str) -> None:
        raise ValueError(f"Failed to look up actor with name '{name}'")

    monkeypatch.setattr("ray.get_actor", nobody)
    scores._scorer.forget("reward-0.0")
    with pytest.raises(PeerDied, match=r"reward replica reward-0\.0: died"):
        scores._scorer.unmoved_s("reward-0.0")
    clock.sleep(100)
    assert scores.done()  # `result` asks another


def test_who_needs_a_part_waits_for_longer_than_it_may_take_to_come_up_or_be_silent() -> None:
    config = load_config("tasks/toy.toml", ["cluster.start_timeout_s=900", "learner.ranks=2"])
    patient = Worker(context(config, None), Member(name="actor-0"))._config
    place_and_start_s = 2 * 900
    assert patient.actors.score_timeout_s > place_and_start_s  # for a replica
    assert patient.actors.pace_timeout_s > place_and_start_s  # for the learner
    assert patient.learner.starvation_timeout_s > place_and_start_s  # for actors and replicas
    assert patient.learner.collective_timeout_s > patient.learner.starvation_timeout_s
    silence_s = config.cluster.silence_timeout_s
    assert patient.buffer.timeout_s > silence_s  # for Redis
    assert patient.cluster.answer_timeout_s > silence_s + 900  # for the weight store


class Pinged:
    """The handle of a service that answers while `answers` holds."""

    def __init__(self) -> None:
        self.answers = True
        self.starts_at_once = True
        self.dies = False
        self.process = 1
        self.restarts = 0
        self.ping = SimpleNamespace(remote=lambda: self)

    def get(self, ping: object) -> int:
        if self.dies:
            raise RayActorError
        return self.process


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Pinged:
    def restart(handle: Pinged, *, no_restart: bool) -> None:
        assert not no_restart
        handle.restarts += 1
        handle.process += 1
        handle.answers = handle.starts_at_once

    monkeypatch.setattr("ray.wait", lambda refs, timeout: (refs if refs[0].answers else [], []))
    monkeypatch.setattr("ray.get", lambda ping: None)
    monkeypatch.setattr("ray.kill", restart)
    return Pinged()


def watched(service: Pinged, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """A watch over the service: what it says in so many seconds."""
    clock = Clock(lambda now_s: None)
    monkeypatch.setattr(services, "awake_s", clock.monotonic)
    handle: Any = service
    watch = ServiceWatch("weight store", handle, timeout_s=60, start_timeout_s=300)

    def said(seconds: int) -> list[str]:
        lines = []
        for _ in range(seconds):
            clock.sleep(1.0)
            lines.append(watch.poll())
        return [line for line in lines if line]

    return said


def test_a_service_that_is_silent_is_restarted_after_its_time(
    service: Pinged, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = watched(service, monkeypatch)
    assert said(200) == []
    service.answers = False
    assert said(50) == []
    assert said(20) == [
        "weight store: no answer for 60 s (cluster.silence_timeout_s); replacing it"
    ]
    assert service.restarts == 1
    assert said(200) == []

    # One that has been restarted has the time that a start may take, until it answers.
    service.answers = service.starts_at_once = False
    assert len(said(70)) == 1
    assert said(290) == []
    service.answers = True
    assert said(200) == []
    assert service.restarts == 2


def test_a_service_that_dies_is_told_once_and_has_the_time_of_a_start(
    service: Pinged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", service.get)
    said = watched(service, monkeypatch)
    assert said(100) == []
    service.dies = True
    assert said(10) == ["weight store: died; Ray is starting it again"]
    service.answers = service.dies = False  # it starts, and calls wait for it
    assert said(250) == []
    service.answers = True
    assert said(100) == []
    service.process = 2  # it had died between two pings
    assert said(100) == ["weight store: died; Ray has started it again"]
    service.answers = False
    assert len(said(70)) == 1 and service.restarts == 1  # the time of a start is over
    assert said(100) == []  # and whom the watch has replaced is not told again


def test_a_driver_that_was_stopped_does_not_take_its_parts_for_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(lambda now_s: None)
    monkeypatch.setattr(awake, "time", clock)
    monkeypatch.setattr(AwakeClock, "_run", lambda self: None)
    own = AwakeClock()

    def beat(seconds: int) -> None:
        for _ in range(2 * seconds):
            clock.sleep(0.5)
            own._beat_s = own._note_gap()

    began_s = own.now_s()
    beat(60)
    assert own.now_s() - began_s == 60.0
    clock.sleep(500.0)  # stopped
    assert own.now_s() - began_s == 60.0  # whoever looks first, the beat or somebody else
    beat(10)
    assert own.now_s() - began_s == 70.0


def test_a_silent_learner_holds_no_other_part_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda now_s: None)
    monkeypatch.setattr(worker_group, "awake_s", clock.monotonic)
    waited_s: list[float] = []

    def wait(refs: list[str], *, timeout: float, **_: object) -> tuple[list[str], list[str]]:
        waited_s.append(timeout)
        return [], refs

    monkeypatch.setattr("ray.wait", wait)
    monkeypatch.setattr("ray.get", lambda refs: [])
    launch: Any = SimpleNamespace(ready="ready")
    config = ClusterConfig(silence_timeout_s=60)
    learner = WorkerGroup("learner", launch, incarnation=0, config=config)
    learner.phase, learner.status = Phase.RUNNING, {"rows": 3}
    calls = {name: SimpleNamespace(remote=lambda *_: "ref") for name in ("status", "reports_since")}
    handle: Any = SimpleNamespace(**calls)
    learner.handles = [handle]
    for _ in range(70):
        learner.poll()
        assert learner.reports("rows") == []
        clock.sleep(1.0)
    assert set(waited_s) == {0}
    assert learner.phase is Phase.FAILED and "no answer to status for 60 s" in learner.cause


def test_a_start_may_take_as_long_as_it_comes_further(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda now_s: None)
    monkeypatch.setattr(worker_group, "awake_s", clock.monotonic)
    monkeypatch.setattr(worker_group, "room", lambda: "nothing is free")
    nodes = {"head"}
    monkeypatch.setattr(worker_group, "node_ids", lambda: frozenset(nodes))
    done: set[str] = set()
    loaded = {"rank 0": 1, "rank 1": 1}
    monkeypatch.setattr(
        "ray.wait",
        lambda refs, **_: ([r for r in refs if r in done], [r for r in refs if r not in done]),
    )
    monkeypatch.setattr("ray.get", lambda refs: [loaded.get(ref) for ref in refs])

    def rank(ref: str) -> Any:
        def answer(said: str) -> Any:
            return SimpleNamespace(remote=lambda *_: said)

        return SimpleNamespace(progress=answer(ref), rendezvous=answer("met"), start=answer("up"))

    launch: Any = SimpleNamespace(
        ready="place", wanted="1 GPU", create=lambda: [rank(ref) for ref in loaded]
    )

    def group() -> WorkerGroup:
        return WorkerGroup("reward-0", launch, incarnation=0, config=ClusterConfig())

    def poll(group: WorkerGroup, seconds: int) -> Phase:
        for _ in range(seconds):
            clock.sleep(1.0)
            group.poll()
        return group.phase

    loading, homeless = group(), group()
    for number in range(3):
        assert poll(loading, 250) is poll(homeless, 1) is Phase.PLACING
        nodes.add(f"worker {number}")
    done.add("place")
    assert poll(loading, 1) is Phase.MEETING
    done |= {"met", *loaded}
    for _ in range(4):
        assert poll(loading, 250) is Phase.STARTING
        loaded["rank 1"] += 1
    assert poll(loading, 305) is Phase.FAILED
    assert loading.cause == (
        "reward-0: starting made no progress for 300 s (cluster.start_timeout_s)"
    )
    done.clear()
    assert poll(homeless, 1) is Phase.PLACING  # a node has come meanwhile
    for _ in range(15):  # one that goes and comes again brings no place nearer
        nodes.remove("worker 0")
        assert poll(homeless, 10) is Phase.PLACING
        nodes.add("worker 0")
        assert poll(homeless, 9) is Phase.PLACING
    assert poll(homeless, 20) is Phase.FAILED
    assert homeless.cause == (
        "reward-0: no place within 300 s (cluster.start_timeout_s) for 1 GPU: nothing is free"
    )


def test_a_silent_rank_is_found_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda now_s: None)
    monkeypatch.setattr(worker_group, "awake_s", clock.monotonic)
    answers = {"run": False, "rank 0": True, "rank 1": True}

    def wait(refs: list[str], **_: object) -> tuple[list[str], list[str]]:
        return [r for r in refs if answers[r]], [r for r in refs if not answers[r]]

    monkeypatch.setattr("ray.wait", wait)
    monkeypatch.setattr("ray.get", lambda refs: [{"said by": ref} for ref in refs])
    launch: Any = SimpleNamespace(ready="run")
    group = WorkerGroup("reward-0", launch, incarnation=0, config=ClusterConfig())
    ranks: list[Any] = [
        SimpleNamespace(status=SimpleNamespace(remote=lambda ref=ref: ref))
        for ref in ("rank 0", "rank 1")
    ]
    group.phase, group.handles = Phase.RUNNING, ranks

    def poll(seconds: int) -> Phase:
        for _ in range(seconds):
            clock.sleep(1.0)
            group.poll()
        return group.phase

    assert poll(200) is Phase.RUNNING and group.status == {"said by": "rank 0"}
    answers["rank 1"] = False
    assert poll(100) is Phase.RUNNING
    assert poll(30) is Phase.FAILED
    assert group.cause == (
        "reward-0: no answer to status from rank 1 of 2 for 120 s (cluster.silence_timeout_s)"
    )


def test_only_a_learner_that_raised_an_error_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_s: list[float] = []
    learner = SimpleNamespace(phase=Phase.FAILED, error=None)

    def ask(kind: str, *, timeout_s: float) -> list[Any]:
        asked_s.append(timeout_s)
        return []

    learner.reports = ask
    run: Any = SimpleNamespace(groups={"learner": learner}, learner_rows=[], report=print)
    supervisor.Supervisor._collect_reports(run)
    assert asked_s == [0.0, 0.0]
    learner.error = OSError("the disk is full")
    supervisor.Supervisor._collect_reports(run)
    assert min(asked_s[2:]) > 0
