"""What a run does when one of its parts is killed or stopped, or its disk is full or slow.

A small job (the enumerable toy, two ranks of the learner and of a reward replica) runs over Ray on
this machine, then on three machines that are played by namespaces; each row is one fault in it.
SIGKILL ends a part, SIGSTOP stops it for good; but the driver, whom nobody replaces, goes on after
three times the silence that others are granted. Of a Ray node, all processes are hit at once.

    part           what was hit; of ranks the last one, of nodes the one that holds the learner
    detected_s     from the fault to the first line of the run's log that names it, or to the first
                   process in its place
    recovered_s    from the fault until all parts ran and the learner had taken another two steps;
                   a fault that is over by itself is over then
    acknowledged   trajectories that the buffer had acknowledged when the fault came
    lost           of them, and of what a witness stored meanwhile, how many are unaccounted for
    duplicated     groups that were taken in twice, and versions that were given twice
    ended          "went on", or the first line of the error that ended the run; it was resumed then

    python bench/faults.py [--json] [--only PART:FAULT ...]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from bench.fault_matrix.disks import SlowDisk, SmallDisk, why_no_disks
from bench.fault_matrix.job import Job
from bench.fault_matrix.ledger import Ledger
from bench.fault_matrix.machines import ADDRESS, SHARED, machines
from bench.fault_matrix.strikes import SILENCE_S, Arsenal
from bench.fault_matrix.trial import Row, measure
from tests.hosts import why_not

SETTINGS = (
    "learner.steps=1000000",
    "learner.ranks=2",
    "learner.groups_per_step=2",
    "learner.checkpoint_every_s=5",
    "learner.collective_timeout_s=300",
    "learner.starvation_timeout_s=200",
    "actors.groups_per_batch=2",
    "actors.group_size=4",
    "reward.ranks=2",
    "reward.deadline_s=10",
    "buffer.timeout_s=10",
    "cluster.actors=1",
    f"cluster.silence_timeout_s={SILENCE_S}",
    "cluster.answer_timeout_s=10",
    "cluster.start_timeout_s=600",
    "cluster.stop_timeout_s=60",
    "cluster.max_restarts=30",
)
LONG_EVALUATION = "evaluation.samples=200"  # so that an evaluator is at work for a while
# Longer than Ray takes to give a stopped node up: one that it still counts on is given new parts.
NODE_SILENCE_S = 30.0
SIGNALS = ("SIGKILL", "SIGSTOP")
Faults = Sequence[tuple[str, str]]
PROCESSES = tuple(
    (part, fault)
    for part in (
        "evaluator",  # first: it is at work when a run begins
        *("rollout actor", "reward rank", "learner rank", "weight store", "replica registry"),
        *("Redis", "driver"),
    )
    for fault in SIGNALS
)
DISKS = tuple((part, fault) for part in ("Redis", "driver") for fault in ("full disk", "slow disk"))
NODES = tuple(("Ray node", fault) for fault in SIGNALS)
ALL = (*PROCESSES, *DISKS, *NODES)


def on_this_machine(folder: Path, chosen: Faults, tell: Callable[[Row], None]) -> None:
    """Faults of processes, then those of disks, in one run."""
    of_disks = [each for each in chosen if each in DISKS]
    slow = SlowDisk(folder) if of_disks else None
    settings = ["cluster.cpus=12", *SETTINGS]
    if any(part == "evaluator" for part, _ in chosen):
        settings.append(LONG_EVALUATION)
    environment = slow.environment if slow is not None else {}
    job = Job(folder, settings, environment=environment)
    with books_of(job) as books:
        for part, fault in chosen:
            if (part, fault) not in DISKS:
                tell(measure(job, books, part, fault, Arsenal()))
        if not of_disks:
            return
        job.wait_until_stepping()
        job.stop()
        with ExitStack() as mounted:
            disks = {}
            for part, place in (("driver", job.directory.path), ("Redis", job.directory.buffer)):
                disks[part] = SmallDisk(place)
                mounted.callback(disks[part].unmount)
            mounted.callback(job.end)
            job.resume()
            for part, fault in of_disks:
                arsenal = Arsenal(small_disks=disks, slow_disk=slow)
                tell(measure(job, books, part, fault, arsenal))


def on_three_machines(folder: Path, chosen: Faults, tell: Callable[[Row], None]) -> None:
    """Faults of nodes, in one run."""
    with machines(folder) as cluster:
        arguments = ["--address", ADDRESS, *SETTINGS, f"cluster.silence_timeout_s={NODE_SILENCE_S}"]
        job = Job(folder, arguments, environment={}, host=cluster.head, shared_at=SHARED)
        with books_of(job) as books:
            for part, fault in chosen:
                tell(measure(job, books, part, fault, Arsenal(machines=cluster)))
                cluster.mend()


@contextmanager
def books_of(job: Job) -> Iterator[Ledger]:
    """The books of a run's buffer; the run ends with them, and an error shows its log."""
    books = Ledger(job)
    try:
        yield books
    except BaseException:
        print("\n".join(job.said()[-60:]), file=sys.stderr)
        raise
    finally:
        books.close()
        job.end()


def possible(asked: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The faults that were asked for, all where none was, and that can be played here."""
    hindrances = dict.fromkeys(DISKS, why_no_disks())
    if not asked or any(":".join(fault) in asked for fault in NODES):
        hindrances |= dict.fromkeys(NODES, why_not(()) or "")
    for fault in ALL:
        name = ":".join(fault)
        if asked and name not in asked:
            continue
        if why := hindrances.get(fault):
            print(f"without {name}: {why}", file=sys.stderr)
        else:
            yield fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    names = [":".join(fault) for fault in ALL]
    parser.add_argument(
        "--only", nargs="+", default=[], choices=names, metavar="PART:FAULT", help=", ".join(names)
    )
    arguments = parser.parse_args()
    chosen = list(possible(arguments.only))
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        text = "  ".join(f"{key}={value}" for key, value in asdict(row).items())
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    began_s = time.monotonic()
    for where, faults in (
        (on_this_machine, [fault for fault in chosen if fault not in NODES]),
        (on_three_machines, [fault for fault in chosen if fault in NODES]),
    ):
        if faults:
            with tempfile.TemporaryDirectory() as folder:
                where(Path(folder), faults, tell)
    if arguments.json:
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[1],
            "seconds": round(time.monotonic() - began_s),
        }
        print(json.dumps(facts | {"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
