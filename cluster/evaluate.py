"""The verb `evaluate`: a model, with or without an adapter, on test data."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.before_after import rows
from cluster.config_file import load_config, locate
from cluster.measure import measure
from cluster.measurement import Measurement, Votes
from cluster.preflight import check_adapter
from cluster.rundir import find_run
from cluster.votes import measure_votes


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    config = load_config(arguments.config)
    adapter = Path(arguments.adapter) if arguments.adapter else None
    if arguments.run:
        found = find_run(arguments.run)
        if found.model.is_dir():  # an M-step's own
            config = config.with_model(found.model)
        else:
            adapter = found.adapter
    if adapter is not None:
        check_adapter(adapter)
    data = [str(locate(path)) for path in arguments.data]
    if data or not config.task.tests:
        measurement: Measurement = measure_votes(config, adapter=adapter, data=data)
    else:
        measurement = measure(config, adapter=adapter)
    if arguments.json:
        print(json.dumps(measurement.model_dump(mode="json", exclude={"examples"})))
    elif isinstance(measurement, Votes):
        show(measurement, title="base" if adapter is None else str(adapter))
    else:
        show_rows(measurement, title="base" if adapter is None else str(adapter))
    return 0


def show(measurement: Votes, *, title: str) -> None:
    """The counts as a table."""
    table = Table("operands", "items", "right", "unseen items", "right", "unparsable", box=None)
    for group, accuracy in measurement.accuracy.items():
        unseen = measurement.unseen[group]
        table.add_row(
            group,
            str(measurement.items[group]),
            f"{accuracy:.1%}",
            str(measurement.unseen_items[group]),
            "" if unseen is None else f"{unseen:.1%}",
            f"{measurement.unparsable[group]:.1%}",
        )
    console = Console()
    console.print(f"[bold]{title}[/bold]")
    console.print(table)


def show_rows(measurement: Measurement, *, title: str) -> None:
    """A measurement of any other kind as a table."""
    table = Table("", "items", "", box=None)
    for row in rows(None, measurement):
        table.add_row(row.label, row.items, row.after)
    console = Console()
    console.print(f"[bold]{title}[/bold]")
    console.print(table)
