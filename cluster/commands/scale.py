"""The verb `scale`: give a run that goes on other numbers of actors and reward replicas."""

import argparse
import fcntl
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.config.project import UserError
from cluster.run.directory import (
    RunDirectory,
    RunState,
    ScaleRequest,
    find_run,
    post_scale_request,
)
from cluster.run.display import duration, parts

ANSWER_TIMEOUT_S = 60.0
# A part that does not come up is given up by the driver, after `cluster.start_timeout_s` for its
# place and as long for its start; this is for a driver that says nothing.
SCALE_TIMEOUT_S = 900.0
_POLL_S = 0.1


def run(arguments: argparse.Namespace) -> int:
    """Scale the run, and say how long it took."""
    request = ScaleRequest(actors=arguments.actors, replicas=arguments.reward_replicas)
    directory = find_run(arguments.run)
    print(
        scale(
            directory, request, answer_timeout_s=ANSWER_TIMEOUT_S, scale_timeout_s=SCALE_TIMEOUT_S
        )
    )
    return 0


def scale(
    directory: RunDirectory,
    request: ScaleRequest,
    *,
    answer_timeout_s: float,
    scale_timeout_s: float,
) -> str:
    """Ask the run's driver, and wait until as many parts run as were asked for; what became of it.

    Raises:
        UserError: nothing was asked for, or the run does not go on; another process waits for its
            driver's answer; or the driver refused, gave none, gave a part up, ended, or took too
            long.
    """
    if not request.numbers:
        raise UserError("nothing to change: give --actors, --reward-replicas or both")
    state = directory.state()
    if state is None:
        raise UserError(f"run {directory.name!r} has no readable {directory.state_file}")
    if not _can_scale(state):
        raise UserError(
            f"run {directory.name!r} cannot be scaled: {_standing(state)}; 'amortize train ... "
            f"--run {directory.name} --resume' takes cluster.actors=N and reward.replicas=N"
        )
    with _alone(directory):
        began = time.monotonic()
        post_scale_request(directory, request)
        try:
            _wait_for_answer(directory, request, timeout_s=answer_timeout_s)
        finally:
            _withdraw(directory)
        state = _wait_for_parts(directory, request, timeout_s=scale_timeout_s)
        return f"run {directory.name!r}: {parts(state)} after {time.monotonic() - began:.1f} s"


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


def _wait_for_answer(directory: RunDirectory, request: ScaleRequest, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        state = directory.state()
        if state is not None and state.scale is not None and state.scale.id == request.id:
            if state.scale.outcome == "refused":
                raise UserError(f"run {directory.name!r}: {state.scale.error}")
            return
        _check_goes_on(directory, state)
        if time.monotonic() > deadline:
            end = (
                "so it was withdrawn"
                if _withdraw(directory)
                else "but the driver has taken it and may yet scale: see 'amortize status'"
            )
            raise UserError(
                f"run {directory.name!r}: no answer to the request within {timeout_s:.0f} s, "
                f"{end}: {_standing(state)}"
            )
        time.sleep(_POLL_S)


def _withdraw(directory: RunDirectory) -> bool:
    """Let the driver not find later what it has not taken by now; whether it had not."""
    try:
        directory.scale_request.unlink()
    except FileNotFoundError:
        return False
    return True


def _wait_for_parts(
    directory: RunDirectory, request: ScaleRequest, *, timeout_s: float
) -> RunState:
    deadline = time.monotonic() + timeout_s
    while True:
        state = directory.state()
        if state is not None and state.scale is not None and state.scale.id == request.id:
            if state.scale.outcome == "given up":
                raise UserError(f"run {directory.name!r}: {state.scale.error} ({parts(state)})")
            if state.scale.outcome == "done":
                return state
        _check_goes_on(directory, state)
        if time.monotonic() > deadline:
            raise UserError(
                f"run {directory.name!r} took the request, but does not have its parts after "
                f"{timeout_s:.0f} s: {_standing(state)}"
            )
        time.sleep(_POLL_S)


def _can_scale(state: RunState) -> bool:
    lost = state.driver() is None and state.host == socket.gethostname()
    return state.phase in ("starting", "training") and not lost


def _check_goes_on(directory: RunDirectory, state: RunState | None) -> None:
    if state is not None and not _can_scale(state):
        raise UserError(
            f"run {directory.name!r} did not get as far as being scaled: {_standing(state)}"
        )


def _standing(state: RunState | None) -> str:
    """Where the run is, for a message."""
    if state is None:
        return "its state cannot be read"
    silence = duration(max(0.0, time.time() - state.heartbeat_s))
    return (
        f"driver {state.pid} on {state.host} was {state.phase} at step {state.step} with "
        f"{parts(state) or 'no parts'}, last heard {silence} ago"
    )
