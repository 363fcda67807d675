"""A run over Ray whose learner is killed before it has left a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench.posterior import descendants, end_family, title, wait
from cluster.config.project import PROJECT_ROOT
from cluster.run.directory import RunDirectory
from cluster.run.metrics_log import read_metrics

STEPS = 100
SETTINGS = [
    f"learner.steps={STEPS}",
    "learner.checkpoint_every_steps=1000",
    "learner.groups_per_step=2",
    "actors.groups_per_batch=2",
    "actors.group_size=4",
    "cluster.actors=1",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Killer:
    """Kills the learner of a run once, when it has taken a few steps."""

    def __init__(self, pid: int, directory: RunDirectory) -> None:
        self.killed = False
        self._driver = psutil.Process(pid)
        self._directory = directory

    def maybe_kill(self) -> None:
        if self.killed or len(read_metrics(self._directory.metrics_file)) < 3:
            return
        [learner] = [p for p in descendants(self._driver) if "LearnerWorker" in title(p)]
        learner.kill()
        self.killed = True
        assert not list(self._directory.checkpoints.glob("step-*"))


def test_a_learner_killed_before_its_first_checkpoint_is_replaced_and_the_run_finishes(
    tmp_path: Path,
) -> None:
    directory = RunDirectory("test", root=tmp_path / "runs")
    log = tmp_path / "train.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cluster",
                "train",
                "tasks/toy.toml",
                "--run",
                "test",
                *SETTINGS,
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    killer = Killer(process.pid, directory)
    try:
        wait(process, during=killer.maybe_kill)
    finally:
        end_family(process)
    said = log.read_text()
    state = directory.state()
    assert state is not None and (process.returncode, state.phase) == (0, "done"), said
    assert killer.killed and said.count("replacing it") == 1, said
    rows = read_metrics(directory.metrics_file)
    steps = [int(row["progress/step"]) for row in rows]
    lost = len(rows) - STEPS
    assert lost >= 3 and steps == [*range(1, lost + 1), *range(1, STEPS + 1)]
    versions = [row["policy/version"] for row in rows]
    assert versions == sorted(set(versions)), "a version came twice"
    assert not any(row["agreement/quarantined"] for row in rows)
