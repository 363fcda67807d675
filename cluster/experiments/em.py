"""The verb `em`: rounds of an E-step and an M-step, each an ordinary run."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from pydantic_core import to_json
from rich.console import Console

from cluster.commands.train import train
from cluster.config.file import load_config
from cluster.experiments.comparison import Result, Table, result_of, summarise
from cluster.experiments.comparison_report import draw, shown_table, write_page
from cluster.experiments.em_steps import EMStep, em_steps
from cluster.experiments.results import finished, made_with
from cluster.run.directory import RunDirectory, RunExists, find_run, new_name, write_whole
from tasks.evaluation.evaluation import Evaluation


class EMStopped(RuntimeError):
    """EM was stopped on request, with steps left."""


class StepChanged(ValueError):
    """A finished step was made with other settings than are asked for now."""


def run(arguments: argparse.Namespace) -> int:
    """Run the steps that are missing, then show and write how the LM went along."""
    shared = load_config(arguments.config, arguments.overrides)
    rounds = arguments.rounds or shared.em.rounds
    name = arguments.run or new_name(f"em-{shared.task.name}")
    folder = find_run(name) if arguments.resume else RunDirectory(name)
    steps = list(
        em_steps(
            arguments.config,
            arguments.overrides,
            rounds=rounds,
            name=lambda kind, number: f"{folder.name}-{kind.lower()}{number}",
        )
    )
    if folder.path.exists() and not arguments.resume:
        raise RunExists(f"{folder.path} exists: add --resume to go on with it, or choose --run")
    folder.path.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=arguments.json)
    address = arguments.address or shared.cluster.address or os.environ.get("RAY_ADDRESS")
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        results = take_steps(
            steps,
            address=None if arguments.local else address,
            local=arguments.local,
            again=f"the same command with --run {folder.name} --resume",
            console=console,
        )
    metrics, compute = summarise(results, "metrics"), summarise(results, "compute")
    written = _write(folder, shared.task.name, results, metrics, compute)
    if arguments.json:
        print(written)
    else:
        console.print(shown_table(metrics, f"{shared.task.name}: {rounds} rounds of EM"))
        console.print(shown_table(compute, "what it took"))
        console.print(f"page: {folder.report_file}", soft_wrap=True, markup=False)
    return 0


def take_steps(
    steps: Sequence[EMStep],
    *,
    address: str | None,
    local: bool,
    again: str,
    console: Console,
    before: Evaluation | None = None,
) -> list[Result]:
    """Run the steps that are not done yet, in order; one result for each.

    Args:
        address, local: see `cluster.commands.train.train`.
        again: what goes on after a stop, for people.
        before: the LM before the first step, where it was measured already.

    Raises:
        EMStopped: on request, with steps left.
        StepChanged: a step that is done has other settings.
        whatever `cluster.commands.train.train` raises.
    """
    results = []
    for step in steps:
        directory = RunDirectory(step.run)
        scores = finished(directory)
        if scores is None:
            console.rule(f"{step.title} (run {step.run})")
            scores = train(
                step.config,
                directory,
                resume=directory.path.exists(),
                address=address,
                local=local,
                before=before,
                console=console,
            )
        elif not made_with(directory, step.config):
            raise StepChanged(
                f"{directory.path} was made with other settings than are asked for now: run under "
                "another --run, or restore the settings that its config.toml has"
            )
        if scores.after is None:
            raise EMStopped(f"stopped in {step.title}; {again} goes on")
        # What an M-step leaves is another LM, and was measured behind the policy.
        before = scores.before if step.kind == "E" else None
        results.append(
            result_of(
                directory,
                scores.after,
                step.config,
                method=step.title,
                seed=step.config.seed,
            )
        )
    return results


def _write(
    folder: RunDirectory, task: str, results: Sequence[Result], metrics: Table, compute: Table
) -> str:
    """Leave page, figure and JSON; the last of them."""
    figure = draw(metrics, folder.path / "em.png")
    write_page(
        folder.report_file,
        title=f"{task}: {', '.join(metrics)}",
        metrics=metrics,
        compute=compute,
        plots=[figure],
        runs="\n".join(result.run for result in results),
    )
    content = {"task": task, "table": metrics, "compute": compute, "runs": list(results)}
    written = to_json(content, inf_nan_mode="null").decode()
    write_whole(folder.path / "em.json", written)
    return written
