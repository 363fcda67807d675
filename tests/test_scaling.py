"""A run over Ray that loses its learner, and is given other numbers of actors and replicas."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bench.audit import audit_buffer
from bench.posterior import descendants, title
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer
from cluster.config.project import PROJECT_ROOT
from cluster.run.directory import RunDirectory, RunState
from cluster.run.display import TRAJECTORIES
from cluster.run.metrics_log import read_metrics
from tests.buffer_toy import replay_of

GROUP_SIZE = 4
SETTINGS = [
    f"actors.group_size={GROUP_SIZE}",
    "actors.groups_per_batch=2",
    "actors.max_ready_groups=6",
    "learner.groups_per_step=2",
    "learner.steps=100000",
    "learner.checkpoint_every_steps=100000",
    "learner.checkpoint_every_s=100000",
    "cluster.actors=1",
    "cluster.cpus=4",
]
TIMEOUT_S = 240.0
PARTS = ("LearnerWorker", "RolloutWorker", "RewardWorker")
LOST_STEPS = 3  # at least, of the first learner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class LiveRun:
    """`amortize train tasks/toy.toml` in a folder of its own, and other verbs beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}
        self.directory = RunDirectory("test", root=folder / "runs")
        with (folder / "train.log").open("w") as log:
            self.process = subprocess.Popen(
                self._command("train", "tasks/toy.toml", "--run", "test", *SETTINGS),
                cwd=folder,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def verb(self, *words: str) -> str:
        done = subprocess.run(
            self._command(*words, "--run", "test"),
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{done.stdout}\n{self.log()}"
        return done.stdout

    def state(self) -> RunState:
        state = self.directory.state()
        assert state is not None
        return state

    def wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def rows(self) -> list[dict[str, float]]:
        return read_metrics(self.directory.metrics_file)

    def pids(self) -> dict[str, set[int]]:
        """Of the run's parts by class, as Ray titles its workers."""
        found: dict[str, set[int]] = {part: set() for part in PARTS}
        for child in descendants(psutil.Process(self.process.pid)):
            called = title(child)
            for part in PARTS:
                if called.startswith("ray::") and part in called:
                    found[part].add(child.pid)
        return found

    def pids_of(self, *counts: int) -> dict[str, set[int]]:
        """Of as many of each class; one that has left takes a moment to be gone."""
        expected = dict(zip(PARTS, counts, strict=True))
        found: dict[str, set[int]] = {}

        def as_many() -> bool:
            nonlocal found
            found = self.pids()
            return {part: len(pids) for part, pids in found.items()} == expected

        self.wait(as_many)
        return found

    def log(self) -> str:
        return (self._folder / "train.log").read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            root = psutil.Process(self.process.pid)
            for member in (root, *root.children(recursive=True)):
                member.kill()

    @staticmethod
    def _command(*words: str) -> list[str]:
        return [sys.executable, "-m", "cluster", *words]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[LiveRun]:
    live = LiveRun(tmp_path)
    yield live
    live.end()


def numbers(state: RunState) -> tuple[dict[str, int], dict[str, int]]:
    return state.desired, state.actual


def lose_learner(run: LiveRun) -> int:
    """Kill the learner before it has left a checkpoint, until another learns; rows of the first."""
    run.wait(lambda: len(run.rows()) >= LOST_STEPS)
    [pid] = run.pids()["LearnerWorker"]
    psutil.Process(pid).kill()
    assert not list(run.directory.checkpoints.glob("step-*"))

    def others() -> list[int]:
        begins = [at for at, row in enumerate(run.rows()) if row["progress/step"] == 1]
        return begins[1:]

    run.wait(lambda: bool(others()))
    assert run.log().count("replacing it") == 1, run.log()
    return others()[0]


def test_a_learner_is_replaced_and_parts_come_and_go_and_nothing_is_lost(run: LiveRun) -> None:
    lost = lose_learner(run)
    run.wait(lambda: run.state().version >= 5)
    first = run.pids_of(1, 1, 1)

    version = run.state().version
    said = run.verb("scale", "--actors", "4", "--reward-replicas", "2")
    print(said)
    assert "actors 4/4, replicas 2/2 after" in said
    run.pids_of(1, 4, 2)
    full = {"actors": 4, "replicas": 2}
    assert numbers(run.state()) == (full, full)
    step = run.state().step
    run.wait(lambda: run.state().step >= step + 10)
    print(run.verb("scale", "--actors", "2", "--reward-replicas", "1"))
    fewer = {"actors": 2, "replicas": 1}
    assert numbers(run.state()) == (fewer, fewer)
    last = run.pids_of(1, 2, 1)
    assert last["LearnerWorker"] == first["LearnerWorker"]
    assert last["RewardWorker"] == first["RewardWorker"]
    assert last["RolloutWorker"] > first["RolloutWorker"]
    step = run.state().step
    run.wait(lambda: run.state().step >= step + 5)

    run.verb("stop")
    assert run.process.wait(TIMEOUT_S) == 0, run.log()
    assert (run.state().phase, run.state().killed) == ("stopped", ()), run.log()
    assert run.log().count("replacing") == 1 and "killed" not in run.log(), run.log()
    rows = run.rows()
    steps = [row["progress/step"] for row in rows]
    assert lost >= LOST_STEPS
    assert steps == [*range(1, lost + 1), *range(1, run.state().step + 1)]
    versions = [row["policy/version"] for row in rows]
    assert versions == sorted(set(versions)), "a version came twice"
    assert not any(row["agreement/quarantined"] for row in rows)
    left = set(re.findall(r"(\S+) has left", run.log()))
    assert left == {"actor-2", "actor-3", "reward-1"}
    check_buffer(run, version=version)


def check_buffer(run: LiveRun, *, version: int) -> None:
    """What the actors were told is stored is what the buffer has, whole and by fresh weights."""
    config = BufferConfig()
    server = RedisServer.start(run.directory.buffer, run="test", config=config)
    try:
        with connect(server.url, password=server.password, timeout_s=20) as client:
            buffer = ReplayBuffer(RedisStore(client, run="test"), config=config)
            audit = audit_buffer(buffer)
            assert audit.ok, audit.discrepancies
            acknowledged = run.state().metrics[TRAJECTORIES]
            print(f"acknowledged {acknowledged:.0f}, accepted {audit.counters.offered}")
            assert audit.counters.offered == acknowledged > 0
            assert audit.counters.groups_accepted * GROUP_SIZE == acknowledged
            added = [t for t in replay_of(buffer) if t.actor in ("actor-1", "actor-2", "actor-3")]
            assert added
            assert min(trajectory.policy_version for trajectory in added) >= version
    finally:
        server.stop(timeout_s=20)
