"""The verb `evaluate`: a model, with or without an adapter, on test data."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.config_file import load_config, locate
from cluster.measurement import Votes
from cluster.preflight import check_adapter
from cluster.rundir import find_run
from cluster.votes import measure_votes


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    config = load_config(arguments.config)
    adapter = Path(arguments.adapter) if arguments.adapter else None
    if arguments.run:
        adapter = find_run(arguments.run).adapter
    if adapter is not None:
        check_adapter(adapter)
    data = [str(locate(path)) for path in arguments.data]
    measurement = measure_votes(config, adapter=adapter, data=data)
    if arguments.json:
        print(json.dumps(measurement.model_dump(mode="json", exclude={"examples"})))
    else:
        show(measurement, title="base" if adapter is None else str(adapter))
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
