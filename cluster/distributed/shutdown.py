"""The orderly end of worker groups: asked to stop, given time, and killed only if they run on."""

import time
from collections.abc import Callable, Sequence

from cluster.distributed.worker_group import Phase, WorkerGroup

# Of the time for all: left to replicas however long those that they score for have taken.
REPLICAS_SHARE = 0.25
_POLL_S = 0.05


def end_in_order(
    groups: Sequence[WorkerGroup],
    *,
    timeout_s: float,
    report: Callable[[str], None],
    watch: Callable[[], None],
) -> list[str]:
    """Have all worker groups of a run end; the names of those that ran on and are to be killed.

    Learner and actors are asked at once: the learner leaves a checkpoint, an actor stores what is
    being scored. Replicas are asked when no actor runs any more, or when three quarters of the
    time are over. A group that does not run yet holds nothing, and is killed at once.

    Args:
        report: takes one line for each group that dies meanwhile.
        watch: called after every look at the groups.
    """
    deadline = time.monotonic() + timeout_s
    running = [group for group in groups if group.phase is Phase.RUNNING]
    for group in groups:
        if group.phase not in (Phase.RUNNING, Phase.FINISHED, Phase.FAILED):
            group.kill()

    def ask(asked: Sequence[WorkerGroup]) -> None:
        for group in asked:
            if group.phase is Phase.RUNNING:
                group.ask_to_stop()

    def wait(waited_for: Sequence[WorkerGroup], until: float) -> None:
        while any(group.phase is Phase.RUNNING for group in waited_for):
            for group in running:
                if group.phase is Phase.RUNNING and group.poll() is Phase.FAILED:
                    report(f"{group.cause}; it was stopping")
            watch()
            if time.monotonic() >= until:
                return
            time.sleep(_POLL_S)

    replicas = [group for group in running if group.name.startswith("reward-")]
    ask([group for group in running if group not in replicas])
    actors = [group for group in running if group.name.startswith("actor-")]
    wait(actors, until=deadline - REPLICAS_SHARE * timeout_s)
    ask(replicas)
    wait(running, until=deadline)
    return [group.name for group in running if group.phase is Phase.RUNNING]
