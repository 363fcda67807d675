"""What is done to the parts of a run, and by what one sees that the run has noticed."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil

from bench.fault_matrix.disks import SlowDisk, SmallDisk
from bench.fault_matrix.job import Job
from bench.fault_matrix.machines import Machines
from bench.posterior import descendants

SILENCE_S = 10.0  # of the run: a part that is silent for longer is replaced
STOPPED_S = 3 * SILENCE_S  # that a driver is stopped, whom nobody replaces
FULL_S = 6.0  # that a disk is full
SLOW_S = 15.0  # that it is slow


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of process of a run."""

    title: str  # what the command line of its processes has in it
    name: str  # how lines of the run's log call it


PARTS = {
    "rollout actor": Part("RolloutWorker", "actor-"),
    "reward rank": Part("RewardWorker", "reward-"),
    "learner rank": Part("LearnerWorker", "learner"),
    "weight store": Part("WeightStoreService", "weight store"),
    "replica registry": Part("ReplicaRegistry", "replica registry"),
    "evaluator": Part("EvaluationWorker", "evaluator-"),
    "Redis": Part("redis-server", "redis-server"),
    "driver": Part("cluster train", "could not write"),
    "Ray node": Part("raylet", "replacing it"),
}
SIGNS = ("replacing", "started", "starting it again", "could not write")
# Nothing has to be replaced, so nobody has to be told.
UNNOTICED = {("driver", "SIGSTOP"), ("driver", "slow disk"), ("Redis", "slow disk")}


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault under way: how long it is kept up, None for good, and what ends it."""

    lasts_s: float | None = None
    end: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arsenal:
    """What faults need besides the run itself."""

    small_disks: Mapping[str, SmallDisk] = field(default_factory=dict)  # by part
    slow_disk: SlowDisk | None = None
    machines: Machines | None = None


def strike(job: Job, part: str, fault: str, arsenal: Arsenal) -> Strike:
    """Begin a fault."""
    if fault == "full disk":
        disk = arsenal.small_disks[part]
        disk.fill()
        return Strike(FULL_S, disk.free)
    if fault == "slow disk":
        assert arsenal.slow_disk is not None
        arsenal.slow_disk.begin("redis" if part == "Redis" else str(job.process.pid))
        return Strike(SLOW_S, arsenal.slow_disk.end)
    for victim in victims(job, part, arsenal):
        victim.send_signal(signal.SIGKILL if fault == "SIGKILL" else signal.SIGSTOP)
    if (part, fault) == ("driver", "SIGSTOP"):
        return Strike(STOPPED_S, lambda: psutil.Process(job.process.pid).resume())
    return Strike()


def victims(job: Job, part: str, arsenal: Arsenal) -> list[psutil.Process]:
    """The processes that a signal goes to: one, or of a node all that run on it."""
    if part == "driver":
        return [psutil.Process(job.process.pid)]
    if part == "Ray node":
        assert arsenal.machines is not None
        return descendants(psutil.Process(arsenal.machines.holder("LearnerWorker").pid))
    # The youngest: of ranks the last, of an actor's incarnations the one that lives, of Redis the
    # server behind its watchdog.
    return job.processes(PARTS[part].title)[-1:]
