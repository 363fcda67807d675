"""The verb `compare`: several methods on one task, at (nearly) equal numbers of trajectories."""

import argparse
from collections.abc import Sequence

from cluster.config.file import load_config
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Result
from cluster.experiments.findings import Findings
from cluster.experiments.frontier import draw_frontier, likelihoods_of
from cluster.experiments.methods import ENDINGS, GFLOWNET, measured_against, member, method
from cluster.experiments.search import search, tuned
from cluster.experiments.suite import Member, Suite


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing, then show and write the comparison."""
    shared = load_config(arguments.config, arguments.overrides)
    suite = Suite(arguments, stem=f"compare-{shared.task_name}", endings=ENDINGS)
    methods = list(dict.fromkeys(arguments.methods or shared.compare.methods))
    check_equal_tokens(methods)
    # All methods of one seed before the next seed: half a comparison compares too.
    planned = [(title, seed) for seed in range(arguments.seeds) for title in methods]
    name = suite.folder.name
    for title, seed in planned:  # what cannot be made is told before anything runs
        planned_member(shared, title, seed, name)
    results: list[Result] = []
    with suite.begun():
        choices = search(shared, methods, suite)
        shared = tuned(shared, choices)
        for number, (title, seed) in enumerate(planned, start=1):
            steps = steps_at_equal_tokens(title, seed, results)
            each = planned_member(shared, title, seed, name, steps)
            results.append(suite.result(each, f"{number} of {len(planned)}"))
    task = shared.task
    held_out = any(getattr(task, key, None) for key in ("validation", "validation_share"))
    findings = Findings(
        suite.folder, "compare", shared.task_name, results, choices, held_out=held_out
    )
    frontier = suite.folder.path / "frontier.png"
    drawable = likelihoods_of(findings.metrics)
    findings.leave([draw_frontier(findings.metrics, frontier)] if drawable else [])
    seeds = f"{arguments.seeds} seed{'' if arguments.seeds == 1 else 's'}"
    title = f"{shared.task_name}: {seeds}"
    findings.show(title, as_json=arguments.json, console=suite.console)
    return 0


def planned_member(
    shared: RunConfig, title: str, seed: int, name: str, steps: int | None = None
) -> Member:
    """A member of the comparison `name`, whose runs are called by it."""
    run, gflownet = f"{name}-{title}-{seed}", f"{name}-{GFLOWNET}-{seed}"
    return member(shared, title, seed=seed, run=run, gflownet=gflownet, steps=steps)


def check_equal_tokens(methods: Sequence[str]) -> None:
    """Raise UserError unless what a method at equal LM tokens is measured against comes first."""
    for place, title in enumerate(methods):
        if not method(title).equal_tokens:
            continue
        if missing := [other for other in measured_against(title) if other not in methods[:place]]:
            raise UserError(
                f"{title} takes its number of steps from {' and '.join(missing)} of the same seed: "
                "put them before it among the methods"
            )


def steps_at_equal_tokens(title: str, seed: int, results: Sequence[Result]) -> int | None:
    """Optimizer steps that bring a method at equal LM tokens to those of gflownet with the same
    seed; None: of another method, which takes the steps of all."""
    if not method(title).equal_tokens:
        return None
    known = {result.method: result.compute for result in results if result.seed == seed}
    own, reference = (known[other] for other in measured_against(title))
    return max(1, round(own["steps"] * reference["tokens"] / own["tokens"]))
