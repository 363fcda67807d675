"""A run as a Ray job: what is uploaded, its logs, its orderly stop, and how it goes on."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from bench.audit import audit_buffer
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer
from tests.page import command

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/cluster.md"
SMALL = (
    "actors.groups_per_batch=2 actors.group_size=4 learner.groups_per_step=2"
    " learner.replayed_per_group=2 learner.checkpoint_every_steps=2 learner.warmup_steps=0"
    " evaluation.samples=1 evaluation.max_items=2 cluster.actors=1"
)
UPLOAD_LIMIT_BYTES = 9_000_000
TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """One node with a dashboard, started as cluster/*.yaml start a head, and a user of it."""

    folder: Path
    dashboard: str
    environment: dict[str, str]

    def type(self, line: str) -> str:
        """What a command of docs/cluster.md prints, typed in the project."""
        line = line.replace("http://127.0.0.1:8265", self.dashboard)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{self.logs()}"
        return done.stdout

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s: {what}\n{self.logs()}"
            time.sleep(0.2)

    def state(self) -> dict[str, Any]:
        path = self.folder / "runs" / "first" / "state.json"
        return json.loads(path.read_text()) if path.exists() else {"step": -1, "phase": "none"}

    def rows(self) -> list[dict[str, float]]:
        path = self.folder / "runs" / "first" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def logs(self) -> str:
        logs = [self.folder / "head.log"]
        for pattern in ("job-driver-*", "worker-*.err"):
            logs += self.folder.glob(f"ray/session_2*/logs/{pattern}")
        return "\n".join(f"==> {log.name}\n{log.read_text()[-3000:]}" for log in logs)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head; it and everything it started are ended by their process ids."""
    # Ray's sockets have long names already, so the folder's must be short.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="am") as name:
        folder = Path(name)
        port, dashboard, agent = (free_port() for _ in range(3))
        environment = os.environ | {
            "HOME": name,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "AMORTIZE_RUNS": str(folder / "runs"),
            "OMP_NUM_THREADS": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        environment.pop("RAY_ADDRESS", None)
        exported = command(PAGE, "export RAY_AUTH_MODE").removeprefix("export ").split("=")
        environment |= {exported[0]: exported[1]}
        made = Cluster(folder, f"http://127.0.0.1:{dashboard}", environment)
        made.type(command(PAGE, "ray get-auth-token"))
        head = [
            *("ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
            *(f"--temp-dir={folder / 'ray'}", f"--dashboard-port={dashboard}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}"),
        ]
        with (folder / "head.log").open("w") as log:
            process = subprocess.Popen(
                head, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            made.wait("dashboard and agent", lambda: listens(dashboard) and listens(agent))
            yield made
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the head and all that descends from it."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_what_a_job_uploads_is_small_and_holds_the_project_only(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(
        str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    with zipfile.ZipFile(package) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {"cluster", "tasks", "pyproject.toml"} <= top
    assert not top & {".git", ".venv", "runs", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    assert package.stat().st_size < UPLOAD_LIMIT_BYTES


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_is_stopped_in_order_and_goes_on_when_it_is_submitted_again(
    cluster: Cluster,
) -> None:
    cluster.type(
        command(PAGE, "ray job submit", "--submission-id first ") + f" {SMALL} learner.steps=100000"
    )
    cluster.wait("training", lambda: cluster.state()["step"] >= 3)
    assert "learner is up" in cluster.type(command(PAGE, "ray job logs"))
    status = command(PAGE, "cluster status") + " --json"
    assert json.loads(re.findall(r"^\{.*\}$", cluster.type(status), re.MULTILINE)[0])["step"] >= 3

    cluster.type(command(PAGE, "cluster scale"))
    assert cluster.state()["actual"] == {"actors": 2, "replicas": 2}

    cluster.type(command(PAGE, "ray job stop"))
    stopped = cluster.state()
    assert (stopped["phase"], stopped["killed"]) == ("stopped", []), cluster.logs()
    redis = (cluster.folder / "runs" / "first" / "buffer" / "redis.conf").read_text()
    address = re.findall(r"^bind (\S+)$", redis, re.MULTILINE)
    assert address == [stopped["address"].partition(":")[0]]  # where Ray knows the head

    steps = stopped["step"] + 3
    cluster.type(command(PAGE, "ray job submit", "--resume") + f" {SMALL} learner.steps={steps}")
    cluster.wait("the end", lambda: cluster.state()["phase"] in ("done", "failed"))
    assert cluster.state()["phase"] == "done", cluster.logs()
    assert [row["progress/step"] for row in cluster.rows()] == list(range(1, steps + 1))
    versions = [row["policy/version"] for row in cluster.rows()]
    assert versions == sorted(set(versions)), "a version came twice"

    config = BufferConfig()
    server = RedisServer.start(cluster.folder / "runs/first/buffer", run="first", config=config)
    try:
        with connect(server.url, password=server.password, timeout_s=20) as client:
            audit = audit_buffer(ReplayBuffer(RedisStore(client, run="first"), config=config))
            assert audit.ok, audit.discrepancies
    finally:
        server.stop(timeout_s=20)
