"""The verb `compare`: several methods on one task, at (nearly) equal numbers of trajectories."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from pydantic import BaseModel
from rich.console import Console

from cluster.commands.train import train
from cluster.config.file import load_config, resolved_toml
from cluster.config.project import UserError, told
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Result, result_of
from cluster.experiments.em import EMStep, take_steps
from cluster.experiments.frontier import draw_frontier, likelihoods_of
from cluster.experiments.methods import EM, em_method_steps, measured_against, method, method_config
from cluster.experiments.suite import Findings, check_same_settings, experiment_folder
from cluster.run.directory import RunDirectory, write_whole
from cluster.run.driver import read_scores
from cluster.run.evaluation import evaluate
from learner.demonstrations import NoDemonstrations
from tasks.evaluation.evaluation import Evaluation


class _Member(BaseModel):
    """One method with one seed."""

    comparison: str
    method: str
    seed: int
    run: str
    config: RunConfig
    steps: tuple[EMStep, ...] = ()  # of gflownet_em; the last of them has this run

    @property
    def title(self) -> str:
        return f"{self.method}, seed {self.seed} (run {self.run})"


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing, then show and write the comparison."""
    shared = load_config(arguments.config, arguments.overrides)
    folder = experiment_folder(
        arguments.run, stem=f"compare-{shared.task_name}", resume=arguments.resume
    )
    methods = list(dict.fromkeys(arguments.methods or shared.compare.methods))
    _check_equal_tokens(methods)
    # All methods of one seed before the next seed: half a comparison compares too.
    seeds = range(arguments.seeds)
    members = [_member(shared, title, seed, folder.name) for seed in seeds for title in methods]
    folder.path.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=arguments.json)
    results: list[Result] = []
    before: dict[str, Evaluation | None] = {}  # the base LM, by what its measurement depends on
    for number, member in enumerate(members, start=1):
        console.rule(f"{number} of {len(members)}: {member.title}")
        if method(member.method).equal_tokens:
            steps = _steps_at_equal_tokens(member, results)
            member = _member(shared, member.method, member.seed, folder.name, steps=steps)
        with _named(member), redirect_stdout(sys.stderr if arguments.json else sys.stdout):
            first = member.steps[0].config if member.steps else member.config
            same = _measured_alike(first)
            result, before[same] = _finish(member, arguments, before.get(same), console)
        results.append(result)
    findings = Findings(folder, "compare", shared.task_name, results)
    _leave(findings, folder)
    title = f"{shared.task_name}: {arguments.seeds} seeds"
    findings.show(title, as_json=arguments.json, console=console)
    return 0


def _leave(findings: Findings, folder: RunDirectory) -> None:
    """Write what was found, with likelihood against diversity where both were measured."""
    drawable = likelihoods_of(findings.metrics)
    frontier = folder.path / "frontier.png"
    findings.leave([draw_frontier(findings.metrics, frontier)] if drawable else [])


def _measured_alike(config: RunConfig) -> str:
    """Equal for runs whose base LM is measured as the same: all that this depends on.

    The run's own seed chooses worked examples, and draws where there are no test files.
    """
    sections = config.model_dump(include={"lm", "task", "evaluation", "posterior"}, mode="json")
    seeded = not config.task.tests or config.evaluation.shots
    seed = config.seed if seeded else None
    return json.dumps([sections, config.learner.trained_temperature(), seed])


def _member(
    shared: RunConfig, title: str, seed: int, name: str, *, steps: int | None = None
) -> _Member:
    em_steps: tuple[EMStep, ...] = ()
    if title == EM:
        em_steps = em_method_steps(shared, seed=seed, comparison=name)
        config = em_steps[-1].config
    else:
        config = method_config(shared, title=title, seed=seed, steps=steps)
    run = f"{name}-{title}-{seed}"
    return _Member(comparison=name, method=title, seed=seed, run=run, config=config, steps=em_steps)


def _check_equal_tokens(methods: Sequence[str]) -> None:
    """Whether what a method at equal LM tokens is measured against comes before it."""
    for place, title in enumerate(methods):
        if not method(title).equal_tokens:
            continue
        if missing := [other for other in measured_against(title) if other not in methods[:place]]:
            raise UserError(
                f"{title} takes its number of steps from {' and '.join(missing)} of the same seed: "
                "put them before it among the methods"
            )


def _steps_at_equal_tokens(member: _Member, results: Sequence[Result]) -> int:
    """Optimizer steps that bring the method to the LM tokens of gflownet with the same seed."""
    known = {result.method: result.compute for result in results if result.seed == member.seed}
    own, reference = (known[title] for title in measured_against(member.method))
    return max(1, round(own["steps"] * reference["tokens"] / own["tokens"]))


def _finish(
    member: _Member, arguments: argparse.Namespace, before: Evaluation | None, console: Console
) -> tuple[Result, Evaluation | None]:
    """The member's result, from its run or from its files; and the base as measured by it."""
    if member.steps:
        return _finish_em(member, arguments, before, console)
    directory, config = RunDirectory(member.run), member.config
    trained = method(member.method).trained
    measured = _finished(member, directory)
    if measured is None and not trained:
        measured = _measure_base(directory, config)
    elif measured is None:
        scores = train(
            config,
            directory,
            resume=directory.path.exists(),
            address=arguments.address,
            local=arguments.local,
            before=before,
            console=console,
        )
        if scores.after is None:
            raise UserError(f"stopped; {_again(member)} goes on")
        measured = scores.after
    if trained:
        before = read_scores(directory).before or before
    result = result_of(
        directory,
        measured,
        config,
        method=member.method,
        seed=member.seed,
    )
    return result, before


def _finish_em(
    member: _Member, arguments: argparse.Namespace, before: Evaluation | None, console: Console
) -> tuple[Result, Evaluation | None]:
    """The same of gflownet_em: measured after the last step, at the cost of all."""
    results = take_steps(
        member.steps,
        address=arguments.address,
        local=arguments.local,
        again=_again(member),
        console=console,
        before=before,
    )
    compute = {key: sum(r.compute[key] for r in results) for key in results[-1].compute}
    known = read_scores(RunDirectory(member.steps[0].run)).before or before
    own = {"method": member.method, "compute": compute}
    return results[-1].model_copy(update=own), known


def _again(member: _Member) -> str:
    return f"the same command with --run {member.comparison} --resume"


def _finished(member: _Member, directory: RunDirectory) -> Evaluation | None:
    """What a run that is done has measured; None where it is to be run."""
    scores = read_scores(directory)
    measured = scores.after if method(member.method).trained else scores.before
    if measured is None:
        return None
    check_same_settings(directory, member.config)
    return measured


def _measure_base(directory: RunDirectory, config: RunConfig) -> Evaluation:
    """Measure the LM without an adapter, in this process."""
    directory.begin(resume=directory.config_file.exists())
    try:
        write_whole(directory.config_file, resolved_toml(config))
        measured = evaluate(config, adapter=None, step=0)
        scores = read_scores(directory).model_copy(update={"before": measured})
        write_whole(directory.scores_file, scores.model_dump_json(indent=2))
        return measured
    finally:
        directory.end()


@contextmanager
def _named(member: _Member) -> Iterator[None]:
    """Errors that are written for people say which run they are of; others, defects, get a note."""
    try:
        yield
    except NoDemonstrations as error:
        raise UserError(f"{member.title}: {error}; leave it out of --methods") from error
    except Exception as error:
        if (text := told(error)) is not None:
            raise UserError(f"{member.title}: {text}") from error
        error.add_note(f"in {member.title}")
        raise
