"""The verb `evaluate`: a model, with or without an adapter, on test data."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster.config.file import load_config
from cluster.config.project import UserError, locate
from cluster.config.schema import RunConfig
from cluster.reports.score_table import table
from cluster.run.directory import RunDirectory, find_run
from cluster.run.evaluation import evaluate
from cluster.run.preflight import check_adapter
from cluster.run.terminal import stages


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    adapter: Path | None = None
    step: int | None = 0
    if arguments.run:
        run = find_run(arguments.run)
        config = as_learned(config, arguments.overrides, run)
        if run.model.is_dir():  # an M-step's own
            config = config.changed({"lm.model": str(run.model)})
        else:
            adapter = run.adapter
            check_adapter(adapter)
        state = run.state()
        step = None if state is None else state.step
    elif arguments.adapter:
        adapter, step = Path(arguments.adapter).absolute(), None
        check_adapter(adapter)
    if arguments.split:
        config = config.changed({"evaluation.split": arguments.split})
    if arguments.data:
        config = on_files(config, arguments.data)
    with stages(Console(stderr=True)) as progress:
        found = evaluate(config, adapter=adapter, step=step, progress=progress)
    if arguments.json:
        print(found.model_dump_json(exclude={"examples"}))
        return 0
    console = Console()
    console.print(f"[bold]{escape('base' if adapter is None else str(adapter))}[/bold]")
    console.print(table(None, found))
    return 0


def as_learned(config: RunConfig, overrides: Sequence[str], run: RunDirectory) -> RunConfig:
    """With what the run learned by: its objective and its T say what its adapter is measured as,
    its base what the adapter belongs to, and its seed which data its task drew.

    Raises:
        UserError: an override says otherwise.
    """
    if other := [word for word in overrides if re.match(r"\s*learner\s*[.=]", word)]:
        raise UserError(
            f"{' and '.join(other)}: how run {run.name!r} learned is read from {run.config_file}; "
            "leave it out"
        )
    own = load_config(str(run.config_file))
    return config.changed({"learner": own.learner, **of_run(own, config, overrides)})


def of_run(own: RunConfig, config: RunConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The changes that give a run's seed and base, but for what the command line says of them.

    `config` says where the base is loaded, and where it lies if its folder is not here any more.
    """
    said = {word.partition("=")[0].strip() for word in overrides}
    changes: dict[str, Any] = {} if "seed" in said else {"seed": own.seed}
    if "lm" not in said:
        kept = ["lm.device", *(key for key in said if key.startswith("lm."))]
        if Path(own.lm.model).is_absolute() and not Path(own.lm.model).exists():
            kept += ["lm.model", "lm.revision"]
        changes |= {"lm": own.lm} | {key: getattr(config.lm, key[len("lm.") :]) for key in kept}
    return changes


def on_files(config: RunConfig, paths: Sequence[str]) -> RunConfig:
    """The run with other test files, looked for as `locate` says; raises UserError."""
    if "tests" not in type(config.task).model_fields:
        raise UserError(
            f"task {config.task.name!r} is measured by its distance to the posterior, on no files: "
            "leave --data out"
        )
    files = [str(locate(path).resolve()) for path in paths]
    return config.changed({"task.tests": files, "task.validation": [], "evaluation.split": "test"})
