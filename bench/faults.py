"""What a run does when one of its parts is killed or stopped, or its disk is full or slow.

A small job (the enumerable toy) runs over Ray on this machine; each row is one fault in it. SIGKILL
ends a part, SIGSTOP stops it for good, but the driver, which goes on after longer than any
deadline. A full disk refuses every write to a file, a slow one takes its time for every sync and
rename; both are played by a library that is loaded into Redis and the driver and obeys files in
the run's folder (needs gcc).

    part           what was hit
    detected_s     from the fault to the first line of the run's log that names it
    recovered_s    from the fault until all parts ran and the learner had taken another step
    acknowledged   trajectories that the buffer had acknowledged when the fault came
    lost           of those, how many it does not account for afterwards
    duplicated     groups that are stored twice, and versions that were given twice
    ended          "went on", or the first line of the error that ended the run; it was resumed then

    python bench/faults.py [--json] [--only PART:FAULT ...]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from bench.posterior import PROJECT, descendants, end_family, title
from buffer.audit import audit_contents
from buffer.config import BufferConfig
from buffer.connection import BufferUnreachable, connect
from buffer.redis_store import RedisStore
from buffer.server import reach
from cluster.run.directory import RunDirectory, RunState
from cluster.run.metrics_log import read_metrics

RUN = "faults"
SILENCE_S = 10.0
ROW_TIMEOUT_S = 900.0
FULL_S = 6.0  # that a disk stays full
SLOW_S = 15.0  # that it stays slow
SLOW_SYNC_MS = 1500
STATE_S = 2.5  # in which the driver has written what it has found
SITTINGS = 4  # to meet an evaluator at work
SETTINGS = (
    "learner.steps=1000000",
    "learner.groups_per_step=2",
    "learner.checkpoint_every_s=5",
    "actors.groups_per_batch=2",
    "actors.group_size=4",
    "reward.deadline_s=10",
    "buffer.timeout_s=10",
    "cluster.cpus=12",
    "cluster.actors=1",
    f"cluster.silence_timeout_s={SILENCE_S}",
    "cluster.answer_timeout_s=10",
    "cluster.start_timeout_s=600",
    "cluster.stop_timeout_s=60",
    "cluster.max_restarts=30",
)
DISK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
extern char *program_invocation_short_name;
static int ordered(const char *what) {  /* FOLDER/WHAT holds "redis" or the driver's pid */
    const char *folder = getenv("FAULTS_FOLDER");
    char path[4096], who[32] = "";
    if (!folder) return 0;
    snprintf(path, sizeof path, "%s/%s", folder, what);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    char *line = fgets(who, sizeof who, file);
    fclose(file);
    if (!line) return 0;
    if (!strncmp(who, "redis", 5)) return !strncmp(program_invocation_short_name, "redis", 5);
    return atoi(who) == getpid();
}
static void wait_if_slow(void) { if (ordered("slow")) usleep(MILLISECONDS * 1000); }
ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    struct stat facts;
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "write");
    if (fd > 2 && !fstat(fd, &facts) && S_ISREG(facts.st_mode) && ordered("full")) {
        errno = ENOSPC;
        return -1;
    }
    return real(fd, data, size);
}
#define SLOW(name, parameters, arguments) int name parameters { \\
    static int (*real) parameters; \\
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name); \\
    wait_if_slow(); \\
    return real arguments; }
SLOW(fsync, (int fd), (fd))
SLOW(fdatasync, (int fd), (fd))
SLOW(rename, (const char *old, const char *new), (old, new))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault."""

    part: str
    fault: str
    detected_s: float | None  # None: nobody was told, for nothing was replaced
    recovered_s: float | None
    acknowledged: int
    lost: int
    duplicated: int
    ended: str


class Job:
    """A run in a folder of its own, started again where it ends.

    Args:
        folder: for the run, its log and the orders of the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = RunDirectory(RUN, root=folder / "runs")
        self.log = folder / "train.log"
        self._environment = os.environ | {
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            "AMORTIZE_RUNS": str(folder / "runs"),
            "FAULTS_FOLDER": str(folder),
        }
        if disk := compiled_disk(folder):
            self._environment["LD_PRELOAD"] = str(disk)
        self.has_disk = disk is not None
        self.process = self._start()

    def _start(self, *more: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "cluster", "train", "tasks/toy.toml", "--run", RUN]
        with self.log.open("a") as output:
            return subprocess.Popen(
                [*command, *more, *SETTINGS],
                cwd=self.folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def resume(self) -> None:
        """Go on with a run that has ended."""
        end_family(self.process)
        self.process = self._start("--resume")

    def wait_until_measuring(self) -> None:
        """Wait until all parts run and the base LM is measured, anew in further sittings."""

        def measuring() -> bool:
            return self.is_whole() and bool(self.processes("EvaluationWorker"))

        for _ in range(SITTINGS):
            self.wait(lambda: measuring() or self.directory.scores_file.exists())
            if measuring():
                return
            self.process.terminate()
            self.process.wait(timeout=ROW_TIMEOUT_S)
            self.directory.scores_file.unlink()
            self.resume()
        raise TimeoutError("no evaluator was seen at work")

    def said(self, since: int) -> list[str]:
        """Lines of the log after its first `since` bytes."""
        return self.log.read_bytes()[since:].decode(errors="replace").splitlines()

    def state(self) -> RunState | None:
        """What this sitting's driver last wrote."""
        state = self.directory.state()
        return state if state is not None and state.pid == self.process.pid else None

    def is_whole(self) -> bool:
        """Whether all parts run."""
        state = self.state()
        return state is not None and state.phase == "training" and state.actual == state.desired

    def step(self) -> int:
        """Steps that the learner has taken, over all its incarnations; -1 before the first."""
        return len(read_metrics(self.directory.metrics_file))

    def processes(self, word: str) -> list[psutil.Process]:
        """Descendants of the driver whose command line has `word`, the oldest first."""
        driver = psutil.Process(self.process.pid)
        found = [each for each in descendants(driver) if word in title(each)]
        return sorted(found, key=lambda each: each.create_time())

    def wait(self, holds: Callable[[], bool], *, or_end: bool = False) -> bool:
        """Wait until something holds; False where `or_end` and the run ended before.

        Raises TimeoutError after ROW_TIMEOUT_S.
        """
        deadline = time.monotonic() + ROW_TIMEOUT_S
        while not holds():
            if self.process.poll() is not None:
                if or_end:
                    return False
                raise RuntimeError("\n".join(self.said(0)[-20:]))
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(self.said(0)[-20:]))
            time.sleep(0.1)
        return True

    def wait_until_stepping(self) -> None:
        """Wait until all parts run and two more steps are taken."""
        self.wait(self.is_whole)
        step = self.step()
        self.wait(lambda: self.is_whole() and self.step() >= step + 2)


def compiled_disk(folder: Path) -> Path | None:
    """The library that plays a bad disk; None without gcc."""
    source = folder / "disk.c"
    source.write_text(DISK.replace("MILLISECONDS", str(SLOW_SYNC_MS)))
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "disk.so"), str(source), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return folder / "disk.so"


@contextmanager
def store_of(job: Job) -> Iterator[RedisStore]:
    """The run's buffer, read by a client of its own."""
    url, password = reach(job.directory.buffer, BufferConfig())
    with connect(url, password=password, timeout_s=10.0) as client:
        yield RedisStore(client, run=RUN)


def offered(job: Job) -> int:
    """Trajectories that the buffer has acknowledged."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            with store_of(job) as store:
                return audit_contents(store.contents(), BufferConfig()).counters.offered
        except BufferUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def account(job: Job, acknowledged: int) -> tuple[int, int]:
    """Acknowledged trajectories that are unaccounted for, and what is there twice."""
    with store_of(job) as store:
        contents = store.contents()
    audit = audit_contents(contents, BufferConfig())
    missing = max(0, acknowledged - audit.counters.offered) + len(audit.discrepancies)
    groups = Counter(contents.groups.values())
    versions = Counter(row["policy/version"] for row in read_metrics(job.directory.metrics_file))
    twice = sum(count - 1 for counts in (groups, versions) for count in counts.values())
    return missing, twice


def strike(job: Job, part: str, fault: str) -> None:
    """Do it to the part; returns when the fault is over or is for good."""
    words = {
        "rollout actor": "RolloutWorker",
        "reward rank": "RewardWorker",
        "learner rank": "LearnerWorker",
        "weight store": "WeightStoreService",
        "replica registry": "ReplicaRegistry",
        "evaluator": "EvaluationWorker",
        "Redis": "redis-server",
    }
    if fault in ("full disk", "slow disk"):
        order = job.folder / fault.removesuffix(" disk")
        order.write_text("redis" if part == "Redis" else str(job.process.pid))
        time.sleep(FULL_S if fault == "full disk" else SLOW_S)
        order.unlink()
        return
    found = [psutil.Process(job.process.pid)] if part == "driver" else job.processes(words[part])
    victim = found[-1]  # of Redis the server behind its watchdog
    if fault == "SIGKILL":
        victim.kill()
    else:
        victim.send_signal(signal.SIGSTOP)
        if part == "driver":
            time.sleep(3 * SILENCE_S)
            victim.send_signal(signal.SIGCONT)


NAMES = {
    "rollout actor": "actor-",
    "reward rank": "reward-",
    "learner rank": "learner",
    "weight store": "weight store",
    "replica registry": "replica registry",
    "evaluator": "evaluator-",
    "Redis": "redis-server",
    "driver": "could not write",
}
SIGNS = ("replacing", "started again", "could not write")


def measure(job: Job, part: str, fault: str) -> Row:
    """Strike once and see what comes of it; the run is whole again afterwards."""
    if part == "evaluator":
        job.wait_until_measuring()
    else:
        job.wait_until_stepping()
    acknowledged, step, since = offered(job), job.step(), job.log.stat().st_size
    before = len(job.processes("EvaluationWorker"))
    began = time.monotonic()
    strike(job, part, fault)
    detected: list[float] = []
    looked_s = [time.time() + STATE_S]  # the first state that knows of it

    def detected_by_now() -> bool:
        told = [line for line in job.said(since) if NAMES[part] in line]
        if not detected and any(sign in line for line in told for sign in SIGNS):
            detected.append(time.monotonic() - began)
            looked_s.append(time.time() + STATE_S)
        return bool(detected)

    silent = (part, fault) in (
        ("driver", "SIGSTOP"),
        ("driver", "slow disk"),
        ("Redis", "slow disk"),
    ) or (part in ("weight store", "replica registry") and fault == "SIGKILL")  # Ray restarts it

    def whole_again() -> bool:
        heard = detected_by_now() or silent
        evaluating = part != "evaluator" or len(job.processes("EvaluationWorker")) >= before
        state = job.state()
        news = state is not None and state.heartbeat_s > looked_s[-1]
        return heard and evaluating and news and job.is_whole() and job.step() >= step + 2

    ended = "went on"
    if not job.wait(whole_again, or_end=True):
        detected.append(time.monotonic() - began)
        errors = [line for line in job.said(since) if line.startswith("amortize")]
        ended = errors[-1] if errors else f"killed; --resume went on ({job.process.returncode})"
        job.resume()
        job.wait_until_stepping()
    recovered = time.monotonic() - began
    lost, duplicated = account(job, acknowledged)
    return Row(
        part=part,
        fault=fault,
        detected_s=round(detected[0], 1) if detected else None,
        recovered_s=round(recovered, 1),
        acknowledged=acknowledged,
        lost=lost,
        duplicated=duplicated,
        ended=ended,
    )


FAULTS = (
    *((part, fault) for part in list(NAMES)[:5] for fault in ("SIGKILL", "SIGSTOP")),
    *(("Redis", fault) for fault in ("SIGKILL", "SIGSTOP", "full disk", "slow disk")),
    *(("driver", fault) for fault in ("SIGKILL", "SIGSTOP", "full disk", "slow disk")),
    ("evaluator", "SIGKILL"),
    ("evaluator", "SIGSTOP"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART:FAULT", help="such as Redis:SIGSTOP"
    )
    arguments = parser.parse_args()
    chosen = [each for each in FAULTS if not arguments.only or ":".join(each) in arguments.only]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder))
        try:
            for part, fault in chosen:
                if fault.endswith("disk") and not job.has_disk:
                    continue
                rows.append(measure(job, part, fault))
                if not arguments.json:
                    print("  ".join(f"{k}={v}" for k, v in asdict(rows[-1]).items()), flush=True)
        except BaseException:
            print(job.log.read_text()[-6000:], file=sys.stderr)
            raise
        finally:
            end_family(job.process)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
