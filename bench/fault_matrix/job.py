"""The run that faults happen to, in a folder of its own, started again where it ends."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from bench.posterior import PROJECT, descendants, end_family, title
from buffer.config import BufferConfig
from cluster.run.directory import RunDirectory, RunState
from cluster.run.metrics_log import read_metrics
from tests.hosts import Host

RUN = "faults"
CONFIG = "tasks/toy.toml"
START_S = 600.0  # longest that a run may take to come up, on a busy machine
_POLL_S = 0.1


class GaveUp(RuntimeError):
    """Something did not come about in time; the text is the end of the run's log."""


class Job:
    """`amortize train` on the enumerable toy.

    Args:
        folder: for the log and, below `shared/runs`, for the run.
        arguments: of the command, settings among them.
        environment: more of it.
        host: where the command is typed, which sees `shared` as `shared_at`; None: here.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        host: Host | None = None,
        shared_at: str = "",
    ) -> None:
        runs = folder / "shared" / "runs"
        runs.mkdir(parents=True)
        self.directory = RunDirectory(RUN, root=runs)
        self.log = folder / "train.log"
        self.buffer = BufferConfig(bind="auto" if host is None else host.address)
        self._folder = folder
        self._arguments = arguments
        self._host = host
        self._environment = {
            "RAY_worker_niceness": "0",  # a busy machine would starve nice ones
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            "AMORTIZE_RUNS": f"{shared_at}/runs" if host is not None else str(runs),
            **environment,
        }
        self._start()

    def _start(self, *more: str) -> None:
        command = [sys.executable, "-m", "cluster", "train", CONFIG, "--run", RUN, *more]
        command += self._arguments
        environment = dict(os.environ) | self._environment
        if self._host is not None:
            pairs = [f"{name}={value}" for name, value in self._environment.items()]
            line = shlex.join(["env", *pairs, *command])
            command, environment = (
                self._host.command(f"cd {PROJECT}; exec {line}"),
                dict(os.environ),
            )
        self._began_s = time.time()
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def resume(self) -> None:
        """Go on with a run that has ended, or end it the hard way and go on."""
        self.end()
        self._start("--resume")

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()
        self.process.wait(timeout=START_S)

    def end(self) -> None:
        """End whatever of it still runs."""
        end_family(self.process)

    def said(self, since: int = 0) -> list[str]:
        """Lines of the log after its first `since` bytes."""
        return self.log.read_bytes()[since:].decode(errors="replace").splitlines()

    def state(self) -> RunState | None:
        """What this sitting's driver last wrote."""
        state = self.directory.state()
        return state if state is not None and state.started_s > self._began_s else None

    def is_whole(self) -> bool:
        """Whether all parts run."""
        state = self.state()
        return state is not None and state.phase == "training" and state.actual == state.desired

    def steps(self) -> int:
        """Steps that the learner has taken, over all its incarnations."""
        return len(read_metrics(self.directory.metrics_file))

    def processes(self, word: str) -> list[psutil.Process]:
        """Processes below this one whose title has `word`, the oldest first."""
        found = [each for each in descendants(psutil.Process()) if word in title(each)]
        return sorted(found, key=lambda each: each.create_time())

    def wait(self, holds: Callable[[], bool], *, timeout_s: float, or_end: bool = False) -> bool:
        """Wait until something holds; False where `or_end` and the run ended before.

        Raises GaveUp.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            ended = self.process.poll() is not None
            if ended and or_end:
                return False
            if ended or time.monotonic() > deadline:
                raise GaveUp("\n".join(self.said()[-20:]))
            time.sleep(_POLL_S)
        return True

    def wait_until_stepping(self) -> None:
        """Wait until all parts run and two more steps are taken; raises GaveUp."""
        self.wait(self.is_whole, timeout_s=START_S)
        steps = self.steps()
        self.wait(lambda: self.is_whole() and self.steps() >= steps + 2, timeout_s=START_S)
