"""The whole system as a user starts it: Ray, Redis and DeepSpeed, with parts killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.audit import audit_buffer
from bench.posterior import descendants
from bench.posterior import title as title_of
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer
from cluster.config.project import PROJECT_ROOT

SMALL = [
    "actors.groups_per_batch=2",
    "actors.group_size=4",
    "learner.groups_per_step=2",
    "learner.replayed_per_group=2",
    "learner.checkpoint_every_steps=2",
    "evaluation.samples=2",
    "evaluation.max_items=4",
    "cluster.actors=1",
    "reward.ranks=2",
]
WHOLE = {"actors": 1, "replicas": 1}
TIMEOUT_S = 240.0
Train = Callable[..., subprocess.Popen[str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """A function that starts `amortize train` in a folder of its own; what still runs is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cluster", "train", "tasks/arithmetic.toml", *arguments]
        with (tmp_path / f"train-{len(started)}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
            for member in family:
                member.kill()


def output(tmp_path: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(tmp_path.glob("train-*.log")))


def state(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "runs" / "test" / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"step": -1, "phase": "none"}


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], tmp_path: Path
) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, f"the run ended early:\n{output(tmp_path)}"
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s:\n{output(tmp_path)}"
        time.sleep(0.1)


def worker(process: subprocess.Popen[str], title: str) -> psutil.Process:
    """The run's process whose title holds `title`; Ray names its workers by class."""
    for child in descendants(psutil.Process(process.pid)):
        if title in title_of(child):
            return child
    raise AssertionError(f"no process {title!r}")


def rows(tmp_path: Path) -> list[dict[str, float]]:
    path = tmp_path / "runs" / "test" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_buffer(tmp_path: Path) -> int:
    """Trajectories in replay, once the buffer has recounted everything."""
    config = BufferConfig()
    server = RedisServer.start(tmp_path / "runs/test/buffer", run="test", config=config)
    try:
        with connect(server.url, password=server.password, timeout_s=10) as client:
            buffer = ReplayBuffer(RedisStore(client, run="test"), config=config)
            audit = audit_buffer(buffer)
            assert audit.ok, audit.discrepancies
            return buffer.stats().replay_size
    finally:
        server.stop(timeout_s=20)


def test_a_run_outlives_its_parts_and_goes_on_where_it_was_stopped(
    train: Train, tmp_path: Path
) -> None:
    process = train("--run", "test", *SMALL, "learner.steps=5000")
    wait_until(lambda: state(tmp_path)["step"] >= 3, process, tmp_path)
    for part, kind in (("RolloutWorker", "actors"), ("RewardWorker", "replicas")):
        worker(process, part).kill()
        wait_until(lambda kind=kind: state(tmp_path)["actual"][kind] == 0, process, tmp_path)  # type: ignore[misc]
    wait_until(lambda: state(tmp_path)["actual"] == WHOLE, process, tmp_path)
    step = state(tmp_path)["step"]
    wait_until(lambda: state(tmp_path)["step"] >= step + 2, process, tmp_path)
    # Stopped while nobody scores: what starts anew lost nothing, and nobody waits for it.
    worker(process, "RewardWorker").kill()
    wait_until(lambda: state(tmp_path)["actual"]["replicas"] == 0, process, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=TIMEOUT_S) == 0, output(tmp_path)
    stopped = state(tmp_path)
    assert (stopped["phase"], stopped["killed"]) == ("stopped", []), output(tmp_path)
    assert psutil.pid_exists(process.pid) is False
    stored = check_buffer(tmp_path)
    assert stored > 0

    steps = stopped["step"] + 4
    process = train("--run", "test", "--resume", *SMALL, f"learner.steps={steps}")
    assert process.wait(timeout=TIMEOUT_S) == 0, output(tmp_path)
    assert (state(tmp_path)["phase"], state(tmp_path)["step"]) == ("done", steps)
    assert [row["progress/step"] for row in rows(tmp_path)] == list(range(1, steps + 1))
    versions = [row["policy/version"] for row in rows(tmp_path)]
    assert versions == sorted(set(versions)), "a version came twice"
    assert check_buffer(tmp_path) >= stored
    run = tmp_path / "runs" / "test"
    for name in ("config.toml", "report.html", "scores.json", "plots", "checkpoints"):
        assert (run / name).exists(), name
    base = AutoModelForCausalLM.from_pretrained(PROJECT_ROOT / "seed_lm/model")
    adapted = PeftModel.from_pretrained(base, run / "adapter")
    assert any(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
