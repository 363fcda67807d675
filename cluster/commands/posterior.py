"""The verb `posterior`: how far a policy is from the exact posterior."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.commands.evaluate import of_run
from cluster.config.file import load_config
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.reports.posterior_plot import draw_posterior
from cluster.reports.posterior_report import show
from cluster.run.directory import RunDirectory, find_run
from cluster.run.evaluation import evaluation_context
from cluster.run.preflight import check_adapter
from cluster.run.terminal import stages
from tasks.posterior.assessment import assess
from tasks.posterior.records import as_json
from tasks.registry import build_task

_BASE = "base"


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    adapter = None
    plot = Path.cwd() / f"posterior-{config.task_name}.png"
    if arguments.run:
        directory = find_run(arguments.run)
        config = of_task(directory, config, arguments.overrides)
        adapter, plot = directory.adapter, directory.plots / "posterior.png"
        check_adapter(adapter)
    with stages(Console(stderr=True)) as progress:
        progress("loading the language model")
        context = evaluation_context(config, adapter, progress=progress)
        task = build_task(config.task, context.language_model.tokenizer, seed=config.seed)
        assessment = assess(task, context)
    policy = arguments.run or _BASE
    pairs = zip(assessment.prompts, assessment.pictures, strict=True)
    pictures = [(report.title, picture) for report, picture in pairs if picture is not None]
    if pictures:
        draw_posterior(pictures, plot, policy=policy, beside_base=adapter is not None)
    if arguments.json:
        print(as_json(assessment, run=arguments.run))
        return 0
    console = Console()
    show(assessment, policy=policy, beside_base=adapter is not None, console=console)
    if pictures:
        console.print(f"plot: {plot}", soft_wrap=True, markup=False)
    else:
        console.print(
            f"no prompt could be enumerated within {config.posterior.max_nodes} prefixes "
            "(posterior.max_nodes): no exact figures and no plot"
        )
    return 0


def of_task(directory: RunDirectory, config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """With the run's base and the seed by which it drew its data.

    Raises UserError for a run of another task.
    """
    own = load_config(str(directory.config_file))
    if own.task_name != config.task_name:
        raise UserError(
            f"run {directory.name!r} is of task {own.task_name!r}, the configuration of "
            f"{config.task_name!r}: give that of the run, {directory.config_file}"
        )
    return config.changed(of_run(own, config, overrides))
