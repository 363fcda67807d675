"""The verb `status`: what runs, and how far it is."""

import argparse
import json
import socket
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config.project import UserError
from cluster.run.directory import RunDirectory, RunState, all_runs, find_run
from cluster.run.display import duration, figures, parts, phase


def run(arguments: argparse.Namespace) -> int:
    """Show one run in full, or all runs with a line each."""
    if arguments.run is None:
        show_all(list(all_runs()), as_json=arguments.json)
    else:
        show_one(find_run(arguments.run), as_json=arguments.json)
    return 0


def show_all(runs: list[RunDirectory], *, as_json: bool) -> None:
    """One line for each run."""
    states = [state for directory in runs if (state := directory.state()) is not None]
    if as_json:
        print(json.dumps({"runs": [plain(state) for state in states]}))
        return
    table = Table("run", "phase", "step", "version", "parts", box=None)
    for state in states:
        table.add_row(
            escape(state.run),
            phase(state),
            f"{state.step}/{state.steps}",
            str(state.version),
            parts(state),
        )
    Console().print(table if states else "no runs here yet: 'amortize train CONFIG' starts one")


def show_one(directory: RunDirectory, *, as_json: bool) -> None:
    """Everything that the state of a run says."""
    state = known_state(directory)
    if as_json:
        print(json.dumps(plain(state)))
        return
    rows = [
        ("run", str(directory.path)),
        ("phase", phase(state)),
        ("step", f"{state.step} of {state.steps}"),
        ("version", str(state.version)),
        ("parts", parts(state)),
        ("driver", f"process {state.pid} on {state.host}"),
        ("ray", state.address or "none: one process"),
        ("heartbeat", f"{_silence(state)} ago"),
        *figures(state.metrics),
    ]
    if state.message:
        rows.append(("last event", state.message))
    if state.killed:
        rows.append(("killed", ", ".join(state.killed)))
    table = Table(box=None, show_header=False)
    for label, value in rows:
        table.add_row(f"[bold]{label}[/bold]", escape(value))
    Console().print(table)


def plain(state: RunState) -> dict[str, Any]:
    """The state as JSON, with whether its driver lives on this machine."""
    return state.model_dump(mode="json") | {"driver_alive": state.driver() is not None}


def known_state(directory: RunDirectory) -> RunState:
    """What the run's driver wrote; raises UserError where it cannot be read."""
    state = directory.state()
    if state is None:
        raise UserError(f"run {directory.name!r} has no readable {directory.state_file}")
    return state


def lost(state: RunState) -> bool:
    """Whether the driver was on this machine, and lives no more."""
    return state.driver() is None and state.host == socket.gethostname()


def standing(state: RunState | None) -> str:
    """Where the run is, for a message."""
    if state is None:
        return "its state cannot be read"
    return (
        f"driver {state.pid} on {state.host} was {state.phase} at step {state.step} with "
        f"{parts(state) or 'no parts'}, last heard {_silence(state)} ago"
    )


def _silence(state: RunState) -> str:
    return duration(max(0.0, time.time() - state.heartbeat_s))
