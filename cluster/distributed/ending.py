"""The orderly end of all parts of a run: asked, given time, and killed only if they do not go."""

import time
from collections.abc import Callable, Sequence

from cluster.distributed.worker_group import Gang, Phase

# Of the time for all: left to replicas however long those that they score for have taken.
REPLICAS_SHARE = 0.25
_POLL_S = 0.05


def end_in_order(
    gangs: Sequence[Gang],
    *,
    timeout_s: float,
    report: Callable[[str], None],
    watch: Callable[[], None],
) -> list[str]:
    """Have all of a run's gangs end; the names of those that ran on and are to be killed.

    Learner and actors are asked at once: the learner leaves a checkpoint, an actor stores what is
    being scored. Replicas are asked when no actor runs any more, or when three quarters of the
    time are over. The learner has all of it, whatever others need. A gang that does not run yet
    holds nothing, and is killed at once.

    Args:
        report: takes one line for each that dies meanwhile.
        watch: called after every look at the gangs.
    """
    deadline = time.monotonic() + timeout_s
    running = [gang for gang in gangs if gang.phase is Phase.RUNNING]
    for gang in gangs:
        if gang.phase not in (Phase.RUNNING, Phase.FINISHED, Phase.FAILED):
            gang.kill()

    def wait(waited_for: Sequence[Gang], until: float) -> None:
        while any(gang.phase is Phase.RUNNING for gang in waited_for):
            for gang in running:
                if gang.phase is Phase.RUNNING and gang.poll() is Phase.FAILED:
                    report(f"{gang.cause}; it was stopping")
            watch()
            if time.monotonic() >= until:
                return
            time.sleep(_POLL_S)

    replicas = [gang for gang in running if gang.name.startswith("reward-")]
    first = [gang for gang in running if gang not in replicas]
    _ask(first)
    actors = [gang for gang in first if gang.name.startswith("actor-")]
    wait(actors, until=deadline - REPLICAS_SHARE * timeout_s)
    _ask(replicas)
    wait(running, until=deadline)
    return [gang.name for gang in running if gang.phase is Phase.RUNNING]


def _ask(gangs: Sequence[Gang]) -> None:
    for gang in gangs:
        if gang.phase is Phase.RUNNING:
            gang.ask_to_stop()
