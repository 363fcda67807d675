"""The verb `evaluate`: a model, with or without an adapter, on test data."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.config.file import load_config, locate
from cluster.config.schema import RunConfig
from cluster.evaluation.measure import measure
from cluster.evaluation.measurement import Measurement, Votes
from cluster.reports.score_table import rows
from cluster.run.directory import RunDirectory, find_run
from cluster.run.preflight import check_adapter


class NoTestFiles(ValueError):
    """Test files were given for a task that reads none."""


class LearnedOtherwise(ValueError):
    """Settings of the learner were given for a run that has its own."""


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    config = load_config(arguments.config, arguments.overrides)
    adapter: Path | None = None
    if arguments.run:
        found = find_run(arguments.run)
        if found.model.is_dir():  # an M-step's own
            config = config.with_model(found.model)
        else:
            adapter = found.adapter
            check_adapter(adapter)
        config = as_learned(config, arguments.overrides, found)
    elif arguments.adapter:
        adapter = Path(arguments.adapter)
        check_adapter(adapter)
    if arguments.data:
        config = on_files(config, arguments.data)
    measurement = measure(config, adapter=adapter)
    if arguments.json:
        print(json.dumps(measurement.model_dump(mode="json", exclude={"examples"})))
    elif isinstance(measurement, Votes):
        show(measurement, title="base" if adapter is None else str(adapter))
    else:
        show_rows(measurement, title="base" if adapter is None else str(adapter))
    return 0


def as_learned(config: RunConfig, overrides: Sequence[str], run: RunDirectory) -> RunConfig:
    """With what the run learned by: its objective and its T say what its adapter is measured as.

    Raises:
        LearnedOtherwise: an override says otherwise.
    """
    if other := [word for word in overrides if re.match(r"\s*learner\s*[.=]", word)]:
        raise LearnedOtherwise(
            f"{' and '.join(other)}: how run {run.name!r} learned is read from {run.config_file}; "
            "leave it out"
        )
    learned = load_config(str(run.config_file), ()).learner
    return config.model_copy(update={"learner": learned})


def on_files(config: RunConfig, paths: Sequence[str]) -> RunConfig:
    """The run with other test files, looked for as `locate` says; raises NoTestFiles."""
    if "tests" not in type(config.task).model_fields:
        raise NoTestFiles(
            f"task {config.task.name!r} is measured by its distance to the posterior, on no files: "
            "leave --data out"
        )
    tests = tuple(str(locate(path)) for path in paths)
    return config.model_copy(update={"task": config.task.model_copy(update={"tests": tests})})


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
