"""Whether the whole distributed job ends at the exact posterior, also under fire.

Each row is one run of `amortize train` on the enumerable toy (Ray, Redis, DeepSpeed, asynchronous),
with the total variation of what it learned to the exact posterior, as the run itself measures it:

    plain   nothing special
    stale   actors are held so far behind that groups are drawn at the edge of `buffer.max_age`
    kills   at random steps a random rollout actor is killed, all run long

    python bench/posterior.py [--json] [--seeds N] [--conditions plain stale kills]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = "tasks/toy.toml"
RUN = "posterior"
MAX_AGE = 16
LAG = 12  # a group that an actor begins this far behind is older yet when it is drawn
OVERRIDES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "stale": (f"buffer.max_age={MAX_AGE}", f"actors.lag_versions={LAG}"),
    "kills": ("cluster.max_restarts=1000",),
}
KILL_EVERY_STEPS = (30, 90)  # from one to the next, uniform: as many on any machine
RUN_TIMEOUT_S = 900.0
_POLL_S = 0.2


class RunEndedBadly(RuntimeError):
    """A command failed or took too long; the text holds what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    condition: str
    seed: int
    tv: float  # total variation to the exact posterior, mean over the prompts
    base_tv: float  # of the base LM
    steps: int
    age_mean: float  # versions, of the groups that the learner drew
    age_max: float
    kills: int
    seconds: float  # of the whole run


def run_condition(condition: str, seed: int, folder: Path, overrides: Sequence[str] = ()) -> Row:
    """Train under `condition` in an empty folder and measure what came of it.

    Raises RunEndedBadly.
    """
    began_s = time.monotonic()
    settings = [f"seed={seed}", *OVERRIDES[condition], *overrides]
    log = folder / "train.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "train", CONFIG, "--run", RUN, *settings],
            cwd=folder,
            env=_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        metrics = folder / "runs" / RUN / "metrics.jsonl"
        killer = Killer(process.pid, metrics, random.Random(seed)) if condition == "kills" else None
        wait(process, during=killer.maybe_kill if killer is not None else lambda: None)
    finally:
        end_family(process)
    if process.returncode:
        raise RunEndedBadly(f"{condition}, seed {seed}: {log.read_text()[-4000:]}")
    seconds = time.monotonic() - began_s
    scores = json.loads((folder / "runs" / RUN / "scores.json").read_text())
    after, before = (scores[when]["metrics"]["tv"]["value"] for when in ("after", "before"))
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return Row(
        condition=condition,
        seed=seed,
        tv=round(after, 4),
        base_tv=round(before, 4),
        steps=len(steps),
        age_mean=round(statistics.mean(row["policy/age_mean_versions"] for row in steps), 1),
        age_max=max(row["policy/age_max_versions"] for row in steps),
        kills=killer.kills if killer is not None else 0,
        seconds=round(seconds, 1),
    )


class Killer:
    """Kills a rollout actor of a run now and then.

    Args:
        pid: of the run's driver, whose descendants alone are touched.
        metrics: has a line for every step.
    """

    def __init__(self, pid: int, metrics: Path, rng: random.Random) -> None:
        self.kills = 0
        self._metrics = metrics
        self._driver = psutil.Process(pid)
        self._rng = rng
        self._next_step = rng.uniform(*KILL_EVERY_STEPS)

    def maybe_kill(self) -> None:
        """Kill one if it is time and one lives."""
        step = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
        if step < self._next_step:
            return
        actors = [p for p in descendants(self._driver) if "RolloutWorker" in title(p)]
        if not actors:
            return
        self._rng.choice(actors).kill()
        self.kills += 1
        self._next_step = step + self._rng.uniform(*KILL_EVERY_STEPS)


def wait(process: subprocess.Popen[bytes], *, during: Callable[[], None]) -> None:
    """Wait for a run to end, doing something now and then; raises RunEndedBadly."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise RunEndedBadly(f"a run took more than {RUN_TIMEOUT_S:.0f} s")
        during()
        time.sleep(_POLL_S)


def end_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a run that has not ended by itself, with all that it started."""
    if process.poll() is not None:
        return
    driver = psutil.Process(process.pid)
    for member in [*descendants(driver), driver]:
        member.kill()
    process.wait()


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All below `process`; none where it is gone."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """Its command line, which Ray sets to the class of its actor; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each condition")
    parser.add_argument(
        "--conditions", nargs="+", choices=list(OVERRIDES), default=list(OVERRIDES), metavar="C"
    )
    arguments = parser.parse_args()
    rows = []
    for condition in arguments.conditions:
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run_condition(condition, seed, Path(folder)))
            if not arguments.json:
                print("  ".join(f"{k}={v}" for k, v in asdict(rows[-1]).items()), flush=True)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    for condition in arguments.conditions:
        tvs = [row.tv for row in rows if row.condition == condition]
        print(f"{condition}: TV median {statistics.median(tvs):.3f}, largest {max(tvs):.3f}")


if __name__ == "__main__":
    main()
