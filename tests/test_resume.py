"""A run in one process that is killed and resumed is the run that never was, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
SETTINGS = [
    "buffer.kind=memory",
    f"learner.steps={STEPS}",
    "learner.checkpoint_every_steps=2",
    "learner.publish_every_steps=2",
    "learner.groups_per_step=3",
    "learner.replayed_per_group=2",
    "learner.agreement_check_share=0.5",
    "actors.groups_per_batch=2",
    "actors.group_size=4",
    "buffer.capacity=40",
    "buffer.max_draws=2",
]


def command(run: str, *more: str) -> list[str]:
    arguments = ["train", "tasks/toy.toml", "--local", "--run", run, *more, *SETTINGS]
    return [sys.executable, "-m", "cluster", *arguments]


def environment(runs: Path) -> dict[str, str]:
    return os.environ | {"AMORTIZE_RUNS": str(runs), "OMP_NUM_THREADS": "1"}


def rows_of(runs: Path, run: str) -> dict[int, dict[str, Any]]:
    """The last row of each step, without what tells of clocks."""
    path = runs / run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {
        int(row["progress/step"]): {
            name: value
            for name, value in row.items()
            if not name.startswith(("time/", "throughput/")) and not name.endswith(("_s", "_per_s"))
        }
        for row in rows
    }


def contents(runs: Path, run: str) -> tuple[dict[str, bytes], list[Any]]:
    """Last checkpoint of a run: its tensors, and its buffer without the times of sampling."""
    (*_, last) = sorted((runs / run / "checkpoints").glob("step-*"))
    assert last.name == f"step-{STEPS:08d}"
    facts = json.loads((last / "meta.json").read_text())["facts"]
    companion = msgpack.unpackb((last / "companion").read_bytes())
    buffer = msgpack.unpackb(companion["buffer"], strict_map_key=False)
    meta, prompts, payload, revision, sampled, duplicates, near, groups, fresh, draws = buffer[1:11]
    timeless = {id: untimed(data) for id, data in payload.items()}
    waiting = {n: [untimed(data) for data in msgpack.unpackb(g)] for n, g in groups.items()}
    stored = [meta, prompts, timeless, revision, sampled, duplicates, near, waiting, fresh, draws]
    state = {
        **{name: t.numpy().tobytes() for name, t in load_file(last / "state.safetensors").items()},
        "facts": json.dumps(facts, sort_keys=True).encode(),
        **{name: msgpack.packb(companion[name]) for name in ("gate", "weights", "policy")},
    }
    return state, stored


def untimed(data: bytes) -> list[Any]:
    """A packed trajectory without `created_s`."""
    fields = msgpack.unpackb(data)
    return [*fields[:11], *fields[12:]]


def kill_after(runs: Path, run: str, step: int) -> None:
    """Start a run and kill it with SIGKILL once it has written the metrics of a step."""
    process = subprocess.Popen(
        command(run),
        cwd=ROOT,
        env=environment(runs),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = runs / run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None and time.monotonic() < deadline, "it was not to end yet"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)


@pytest.mark.slow
def test_a_run_killed_at_any_step_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = subprocess.run(
        command("whole"), cwd=ROOT, env=environment(tmp_path), capture_output=True, check=False
    )
    assert whole.returncode == 0, whole.stderr.decode()
    kill_after(tmp_path, "killed", random.randint(1, STEPS - 2))
    resumed = subprocess.run(
        command("killed", "--resume"),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr.decode()
    expected, stored = contents(tmp_path, "whole")
    found, stored_again = contents(tmp_path, "killed")
    assert {name for name in expected if found[name] != expected[name]} == set()
    assert stored_again == stored
    assert rows_of(tmp_path, "killed") == rows_of(tmp_path, "whole")
