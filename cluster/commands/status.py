"""The verb `status`: what runs, and how far it is."""

import argparse
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cluster.run.directory import RunDirectory, RunState, all_runs, find_run
from cluster.run.display import facts, parts, phase, silence

_WATCH_S = 1.0
_POLL_S = 0.1  # where a driver's answer is waited for
_REWRITTEN_S = 5.0  # within which a driver that goes on writes its state again


def run(arguments: argparse.Namespace) -> int:
    """Show one run in full, or all runs with a line each."""
    run = None if arguments.run is None else find_run(arguments.run)
    if arguments.watch:
        watch(run)
    elif not arguments.json:
        Console().print(listing() if run is None else in_full(run, run.known_state()))
    elif run is None:
        print(json.dumps({"runs": [plain(state) for state in _states()]}))
    else:
        print(json.dumps(plain(run.known_state())))
    return 0


def watch(run: RunDirectory | None) -> None:
    """Show it anew each second: one run until it has ended, all of them until Ctrl-C."""
    with suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
        while run is None:
            live.update(listing(), refresh=True)
            time.sleep(_WATCH_S)
        while True:
            state = run.known_state()
            live.update(in_full(run, state), refresh=True)
            if state.ended or lost(state):
                return
            time.sleep(_WATCH_S)


def listing() -> Table | str:
    """A line for each run."""
    table = Table("run", "phase", "step", "version", "parts", box=None)
    for state in _states():
        table.add_row(
            escape(state.run),
            phase(state),
            f"{state.step}/{state.steps}",
            str(state.version),
            parts(state),
        )
    return table if table.row_count else "no runs here yet: 'amortize train CONFIG' starts one"


def in_full(run: RunDirectory, state: RunState) -> Table:
    """Everything that the state of a run says."""
    rows = [
        ("run", str(run.path)),
        *facts(state),
        ("driver", f"process {state.pid} on {state.host}"),
        ("ray", state.address or "none: one process"),
        ("heartbeat", f"{silence(state)} ago"),
    ]
    if state.message:
        rows.append(("last event", state.message))
    if state.killed:
        rows.append(("killed", ", ".join(state.killed)))
    table = Table(box=None, show_header=False)
    for label, value in rows:
        table.add_row(f"[bold]{label}[/bold]", escape(value))
    return table


def plain(state: RunState) -> dict[str, Any]:
    """The state as JSON, with whether its driver lives on this machine."""
    return state.model_dump(mode="json") | {"driver_alive": state.driver() is not None}


def states(directory: RunDirectory, timeout_s: float) -> Iterator[RunState]:
    """What the run's driver says, again and again, for as long as it is waited for.

    Raises UserError where that cannot be read, and no driver makes it good by writing anew.
    """
    began_s = read_s = time.monotonic()
    while (now := time.monotonic()) - began_s <= timeout_s:
        if (state := directory.state()) is not None:
            read_s = now
            yield state
        elif now - read_s > _REWRITTEN_S:
            directory.known_state()
        time.sleep(_POLL_S)


def lost(state: RunState) -> bool:
    """Whether the driver was on this machine, and lives no more."""
    return state.driver() is None and state.host == socket.gethostname()


def standing(state: RunState | None) -> str:
    """Where the run is, for a message."""
    if state is None:
        return "its state cannot be read"
    return (
        f"driver {state.pid} on {state.host} was {state.phase} at step {state.step} with "
        f"{parts(state) or 'no parts'}, last heard {silence(state)} ago"
    )


def _states() -> list[RunState]:
    return [state for directory in all_runs() if (state := directory.state()) is not None]
