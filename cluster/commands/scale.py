"""The verb `scale`: give a run that goes on other numbers of actors and reward replicas."""

import argparse
import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster.commands.status import lost, standing, states
from cluster.config.project import UserError
from cluster.run.directory import (
    RunDirectory,
    RunState,
    ScaleOutcome,
    ScaleRequest,
    find_run,
    post_scale_request,
)
from cluster.run.display import parts

ANSWER_TIMEOUT_S = 60.0
# A part that does not come up is given up by the driver, after `cluster.start_timeout_s` for its
# place and as long for its start; this is for a driver that says nothing.
SCALE_TIMEOUT_S = 900.0
_TAKEN: tuple[ScaleOutcome, ...] = ("under way", "given up", "done")  # the last two are ends


def run(arguments: argparse.Namespace) -> int:
    """Scale the run, and say how long it took."""
    request = ScaleRequest(actors=arguments.actors, replicas=arguments.reward_replicas)
    directory = find_run(arguments.run)
    print(scale(directory, request))
    return 0


def scale(
    directory: RunDirectory,
    request: ScaleRequest,
    *,
    answer_timeout_s: float = ANSWER_TIMEOUT_S,
    scale_timeout_s: float = SCALE_TIMEOUT_S,
) -> str:
    """Ask the run's driver, and wait until as many parts run as were asked for; what became of it.

    Raises:
        UserError: nothing was asked for, or the run does not go on; another process waits for its
            driver's answer; or the driver refused, gave none, gave a part up, ended, or took too
            long.
    """
    if not request.numbers:
        raise UserError("nothing to change: give --actors, --reward-replicas or both")
    state = directory.known_state()
    if not _can_scale(state):
        raise UserError(
            f"run {directory.name!r} cannot be scaled: {standing(state)}; 'amortize train ... "
            f"--run {directory.name} --resume' takes cluster.actors=N and reward.replicas=N"
        )
    with _alone(directory):
        began = time.monotonic()
        post_scale_request(directory, request)
        try:
            if _answered(directory, request, _TAKEN, timeout_s=answer_timeout_s) is None:
                end = (
                    "so it was withdrawn"
                    if _withdraw(directory)
                    else "but the driver has taken it and may yet scale: see 'amortize status'"
                )
                raise UserError(
                    f"run {directory.name!r}: no answer to the request within "
                    f"{answer_timeout_s:.0f} s, {end}: {standing(directory.state())}"
                )
        finally:
            _withdraw(directory)
        scaled = _answered(directory, request, _TAKEN[1:], timeout_s=scale_timeout_s)
        if scaled is None:
            raise UserError(
                f"run {directory.name!r} took the request, but does not have its parts after "
                f"{scale_timeout_s:.0f} s: {standing(directory.state())}"
            )
        if scaled.scale is not None and scaled.scale.outcome == "given up":
            raise UserError(f"run {directory.name!r}: {scaled.scale.error} ({parts(scaled)})")
        return f"run {directory.name!r}: {parts(scaled)} after {time.monotonic() - began:.1f} s"


@contextmanager
def _alone(directory: RunDirectory) -> Iterator[None]:
    """Hold the only claim to scale the run; it ends with the process, however that ends."""
    with (directory.path / "scale.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run {directory.name!r} is being scaled by another 'amortize scale': "
                f"wait until that has ended"
            ) from None
        yield


def _answered(
    directory: RunDirectory,
    request: ScaleRequest,
    outcomes: Sequence[ScaleOutcome],
    *,
    timeout_s: float,
) -> RunState | None:
    """The state whose answer to the request is one of `outcomes`; None: not within `timeout_s`."""
    for state in states(directory, timeout_s):
        if state.scale is not None and state.scale.id == request.id:
            if state.scale.outcome == "refused":
                raise UserError(f"run {directory.name!r}: {state.scale.error}")
            if state.scale.outcome in outcomes:
                return state
        if not _can_scale(state):
            raise UserError(
                f"run {directory.name!r} did not get as far as being scaled: {standing(state)}"
            )
    return None


def _withdraw(directory: RunDirectory) -> bool:
    """Let the driver not find later what it has not taken by now; whether it had not."""
    try:
        directory.scale_request.unlink()
    except FileNotFoundError:
        return False
    return True


def _can_scale(state: RunState) -> bool:
    return state.phase in ("starting", "training") and not lost(state)
