"""Host memory that loading a base takes, each part a process of its own, and all of a run, on CPU.

A process imports what it needs, notes its resident memory, loads, and reports by how much the peak
exceeds the note, and what it holds afterwards.

    preflight    what a driver does with the base before a run
    whole        an actor, a learner rank, or a reward replica of one rank
    rank of W    a reward rank, which keeps its shard; and its peak while it scores a few
                 rationales, for which layers are gathered

    python bench/loading.py FOLDER [--ranks 2] [--json]
    python bench/loading.py FOLDER --run 10 [KEY=VALUE ...]

The second trains the arithmetic task for so many steps over Ray, two reward ranks sharing the base,
and adds up what all processes of the run hold at a time: proportional set sizes, in which what
several processes share counts once. Linux only: sizes are read from /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from buffer.endpoint import free_port
from lm.config import LMConfig
from lm.model import inspect_base, load_base
from lm.process_group import Rendezvous
from reward.deepspeed_rank import RewardRank
from reward.memory import longest_items
from reward.packing import lay_out

# What a reward rank scores.
ITEMS: dict[str, Any] = {"context": 120, "length": 12, "answer": 4, "stops": range(13)}
ITEMS |= {"number": 2, "vocab_size": 1000}
# A small run: two prompts a step, few texts at a time.
RUN = [
    *("reward.ranks=2", "learner.groups_per_step=2", "learner.replayed_per_group=0"),
    *("actors.group_size=4", "actors.groups_per_batch=2", "actors.max_rows=8"),
    *("actors.max_ready_groups=4", "evaluation.max_items=2", "evaluation.samples=1"),
    *("cluster.start_timeout_s=900", "cluster.silence_timeout_s=600", "reward.deadline_s=300"),
]


def load_here(part: str, folder: str, rank: int, ranks: int, port: int) -> dict[str, float]:
    """MB that this process holds at most, and after it has loaded, above what it held before."""
    config = LMConfig(model=folder, device="cpu")
    place = Rendezvous(address="127.0.0.1", port=port, rank=rank, num_ranks=ranks, timeout_s=300.0)
    work: dict[str, Callable[[], object]] = {
        "preflight": lambda: inspect_base(config),
        "whole": lambda: load_base(config),
        "rank": lambda: RewardRank(config, lambda: place),
    }
    before_kb = size_kb("self/status", "VmRSS")

    def peak_mb() -> float:
        return round((size_kb("self/status", "VmHWM") - before_kb) / 1024, 1)

    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    held = work[part]()
    found = {"peak_mb": peak_mb()}
    found["held_mb"] = round((size_kb("self/status", "VmRSS") - before_kb) / 1024, 1)
    if isinstance(held, RewardRank):
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(2):  # DeepSpeed gathers ahead once it has seen a pass
            list(held.forward(lay_out(longest_items(**ITEMS), token_budget=2048).batches))
        found["scoring_mb"] = peak_mb()
    return found


def size_kb(file: str, name: str) -> int:
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(part: str, folder: str, ranks: int) -> list[dict[str, object]]:
    """A row for every process that the part is."""
    port = free_port("127.0.0.1")
    processes = []
    for rank in range(ranks):
        command = [
            sys.executable,
            __file__,
            folder,
            "--here",
            part,
            str(rank),
            str(ranks),
            str(port),
        ]
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | {"DS_ACCELERATOR": "cpu"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    rows: list[dict[str, object]] = []
    for rank, process in enumerate(processes):
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{part}, rank {rank} of {ranks} failed")
        name = f"rank {rank} of {ranks}" if part == "rank" else part
        rows.append({"part": name, **json.loads(said.splitlines()[-1])})
    return rows


def measure_run(folder: str, steps: int, overrides: list[str]) -> dict[str, object]:
    """The largest sum over the processes of a run, of those that were alive at one time."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "cluster", "train", "tasks/arithmetic.toml", "--run", "r"]
        command += [f"lm.model={folder}", f"learner.steps={steps}", *RUN, *overrides]
        # Workers as urgent as other processes, where the machine has more to do than this.
        told = {"AMORTIZE_RUNS": runs, "RAY_worker_niceness": "0"}
        training = psutil.Popen(command, env=os.environ | told)
        most: dict[str, float] = {}
        start_s = time.monotonic()
        while training.poll() is None:
            found = sizes_mb(training)
            if sum(found.values()) > sum(most.values()):
                most = found
            time.sleep(1.0)
        if training.returncode:
            raise RuntimeError(f"the run ended with status {training.returncode}")
    seconds = round(time.monotonic() - start_s)
    parts = sorted(most.items(), key=lambda one: -one[1])
    return {
        "steps": steps,
        "run_s": seconds,
        "peak_mb": round(sum(most.values())),
        **{name: round(mb) for name, mb in parts},
    }


def sizes_mb(root: psutil.Process) -> dict[str, float]:
    """Proportional set size of a process and all below it; processes of one name together."""
    found: dict[str, float] = {}
    for process in (root, *root.children(recursive=True)):
        try:
            name = process.cmdline()[0].rsplit("/", 1)[-1]
            size_mb = size_kb(f"{process.pid}/smaps_rollup", "Pss:") / 1024
        except (psutil.Error, OSError, IndexError, StopIteration):
            continue  # it has ended, or is about to
        found[name] = found.get(name, 0.0) + size_mb
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of a causal LM")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the run")
    parser.add_argument("--ranks", type=int, default=2, help="that share the base")
    parser.add_argument("--run", type=int, metavar="STEPS", help="measure a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.here is not None:
        part, *numbers = arguments.here
        print(json.dumps(load_here(part, arguments.folder, *map(int, numbers))), flush=True)
        os._exit(0)  # the ranks part without a word
    if arguments.run is not None:
        rows = [measure_run(arguments.folder, arguments.run, arguments.overrides)]
    else:
        parts = {"preflight": 1, "whole": 1, "rank": arguments.ranks}
        rows = [
            row for part, ranks in parts.items() for row in measure(part, arguments.folder, ranks)
        ]
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
