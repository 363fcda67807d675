"""The verb `stop`: ask a run's driver to checkpoint and end, and wait until it has."""

import argparse
import contextlib
import signal

from cluster.commands.status import lost, standing, states
from cluster.config.project import UserError
from cluster.run.directory import RunDirectory, all_runs, find_run

STOP_TIMEOUT_S = 180.0


def run(arguments: argparse.Namespace) -> int:
    """Stop the run that was named, or the only one that goes on."""
    directory = find_run(arguments.run) if arguments.run else the_live_run()
    if directory is None:
        print("no run goes on here")
        return 0
    print(stop(directory))
    return 0


def the_live_run() -> RunDirectory | None:
    """The one run whose driver lives on this machine, if any; raises UserError."""
    live = [each for each in all_runs() if (state := each.state()) and state.goes_on]
    if len(live) > 1:
        names = ", ".join(directory.name for directory in live)
        raise UserError(f"several runs go on: {names}; name one with --run")
    return live[0] if live else None


def stop(directory: RunDirectory, *, timeout_s: float = STOP_TIMEOUT_S) -> str:
    """Stop a run in order; what became of it.

    The request is a file, which a driver on any machine that shares the folder sees; a driver on
    this machine is sent SIGINT as well, once its process is known to be the one that wrote the
    state, for a pid may have been given to another program since.

    Raises:
        UserError: it still goes on after `timeout_s`; says who and what.
    """
    state = directory.known_state()
    if state.ended:
        return f"run {directory.name!r} has ended already: {state.phase} at step {state.step}"
    if lost(state):
        return (
            f"run {directory.name!r} has no driver any more: it died at step {state.step}; "
            f"'amortize train ... --run {directory.name} --resume' goes on with it"
        )
    directory.stop_request.touch()
    if (driver := state.driver()) is not None:
        with contextlib.suppress(ProcessLookupError):
            driver.send_signal(signal.SIGINT)
    for state in states(directory, timeout_s):
        if state.ended:
            killed = f"; had to be killed: {', '.join(state.killed)}" if state.killed else ""
            return f"run {directory.name!r}: {state.phase} at step {state.step}{killed}"
        if lost(state):
            return f"run {directory.name!r}: its driver ended at step {state.step} without a word"
    raise UserError(
        f"run {directory.name!r} did not stop within {timeout_s:.0f} s: {standing(state)}"
    )
