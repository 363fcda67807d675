"""cluster/slurm.sh: what it starts in an allocation, and how that ends, beside stand-ins."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config.placement import ClusterConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cluster/slurm.sh"
WAIT_S = 60.0
# Each writes down how it was called. srun runs what it is given; Ray lives until it is killed; the
# driver is one too, and leaves `state.json` as a run does that is stopped in order.
STAND_INS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done\nexec "$@"',
    "scontrol": "",
    "ray": """
        for word; do case $word in --temp-dir=*) sessions=${word#*=};; esac; done
        if [ "${sessions:-}" ]; then
            mkdir -p "$sessions"
            echo 192.0.2.1:6379 > "$sessions/ray_current_cluster"
        fi
        exec sleep 120""",
    "python": """
        [ "$1" = - ] && exit
        [ "$1" = -c ] && exec "$REAL_PYTHON" "$@"
        run=$AMORTIZE_RUNS/$SLURM_JOB_NAME
        mkdir -p "$run"
        end() { echo "{\\"phase\\": \\"$1\\"}" > "$run/state.json"; exit "$2"; }
        trap 'end "$ON_TERM" 0' TERM
        touch "$run/up"
        [ "$FAILS" ] && end failed 3
        for ((i = 0; i < 1200; i++)); do sleep 0.05; done""",
}


class Allocation:
    """A folder in which the script runs as on the first of `nodes` nodes."""

    def __init__(self, folder: Path, *, nodes: int = 2) -> None:
        self.folder, self.runs, self.calls = folder, folder / "runs", folder / "calls"
        programs = folder / "bin"
        programs.mkdir()
        for name, body in STAND_INS.items():
            program = programs / name
            program.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.calls}\n{body}\n')
            program.chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "AMORTIZE_PYTHON": str(programs / "python"),
            "REAL_PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "AMORTIZE_RUNS": str(self.runs),
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_NAME": "first",
            "SLURM_JOB_ID": f"{os.getpid()}{time.monotonic_ns() % 1000}",
            "SLURM_NNODES": str(nodes),
            "SLURM_CPUS_ON_NODE": "8",
            "SLURMD_NODENAME": "n1",
            "ON_TERM": "stopped",
            "FAILS": "",
        }

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        (self.runs / "first" / "up").unlink(missing_ok=True)
        return subprocess.Popen(
            [SCRIPT, "tasks/toy.toml", "learner.steps=5"], env=self.environment | environment
        )

    def until_up(self) -> None:
        until(lambda: (self.runs / "first" / "up").exists())

    def called(self, program: str) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if line.startswith(f"{program} ")]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


def test_a_run_is_stopped_in_order_and_queued_again_before_the_limit(
    allocation: Allocation,
) -> None:
    script = allocation.start()
    allocation.until_up()
    script.send_signal(signal.SIGUSR1)
    assert script.wait(WAIT_S) == 0
    id = allocation.environment["SLURM_JOB_ID"]
    assert allocation.called("scontrol") == [f"scontrol requeue {id}"]
    head, others = allocation.called("ray")
    assert "--head" in head and "--address=192.0.2.1:6379" in others
    assert not Path(f"/tmp/ray-{id}").exists()
    # The job is started again, by Slurm or by the same line: the run goes on.
    again = allocation.start()
    allocation.until_up()
    again.send_signal(signal.SIGUSR1)
    again.wait(WAIT_S)
    first, second = (line for line in allocation.called("python") if " train " in line)
    train = "python -m cluster train tasks/toy.toml learner.steps=5 --run first --address "
    assert first == f"{train}192.0.2.1:6379" and second == f"{first} --resume"


def test_a_run_that_is_done_by_then_is_not_queued_again(allocation: Allocation) -> None:
    script = allocation.start(ON_TERM="done")
    allocation.until_up()
    script.send_signal(signal.SIGUSR1)
    assert script.wait(WAIT_S) == 0
    assert not allocation.called("scontrol")


def test_a_run_that_fails_fails_the_job_and_leaves_no_ray(allocation: Allocation) -> None:
    assert allocation.start(FAILS="yes").wait(WAIT_S) == 3
    assert not allocation.called("scontrol")
    assert not Path(f"/tmp/ray-{allocation.environment['SLURM_JOB_ID']}").exists()


def test_a_run_that_only_the_bucket_has_goes_on(allocation: Allocation) -> None:
    copy = allocation.folder / "bucket/first"
    copy.mkdir(parents=True)
    (copy / "index.json").write_text('["config.toml"]')
    (copy / "config.toml").write_text("seed = 1")
    bucket = f"file://{allocation.folder}/bucket"
    assert allocation.start(FAILS="yes", AMORTIZE_BUCKET=bucket).wait(WAIT_S) == 3
    assert allocation.called("python")[-1].endswith(" --resume")
    assert (allocation.runs / "first/config.toml").read_text() == "seed = 1"


def test_one_node_has_no_others(tmp_path: Path) -> None:
    allocation = Allocation(tmp_path, nodes=1)
    allocation.start(FAILS="yes").wait(WAIT_S)
    assert len(allocation.called("ray")) == 1


def test_the_signal_comes_early_enough_for_an_orderly_end() -> None:
    text = SCRIPT.read_text()
    (early_s,) = re.findall(r"#SBATCH --signal=B:USR1@(\d+)", text)
    assert int(early_s) >= 2 * ClusterConfig().stop_timeout_s + 120
    assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text
