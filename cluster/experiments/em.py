"""The verb `em`: rounds of an E-step and an M-step, each an ordinary run.

    E-step  a policy q(Z | X) is trained towards p(Z | X, Y) of the LM as it is now
    M-step  the LM is trained to expect Z Y after X, Z ~ q(Z | X): it maximises E_q[log p(Z Y | X)]

What an M-step leaves in its folder `model` is the LM of everything in the next round: of the
rewards, of the policy's base and of the answers.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from cluster.commands.train import train
from cluster.config.file import load_config, parse_overrides
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Result, result_of
from cluster.experiments.suite import Findings, experiment_folder, finished
from cluster.run.directory import RunDirectory
from tasks.evaluation.evaluation import Evaluation

Kind = Literal["E", "M"]
# Of other objectives, and meaningless to an M-step's.
_RESET = {"learner.subtb_lambda": 1.0, "learner.normalisation": "batch", "learner.log_z": "group"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EMStep:
    """One step and its run."""

    kind: Kind
    round: int  # from 1
    run: str
    config: RunConfig

    @property
    def title(self) -> str:
        return f"{self.kind}-step {self.round}"


def run(arguments: argparse.Namespace) -> int:
    """Run the steps that are missing, then show and write how the LM went along."""
    shared = load_config(arguments.config, arguments.overrides)
    rounds = arguments.rounds or shared.em.rounds
    folder = experiment_folder(
        arguments.run, stem=f"em-{shared.task_name}", resume=arguments.resume
    )
    steps = list(
        em_steps(
            shared, rounds=rounds, name=lambda kind, number: f"{folder.name}-{kind.lower()}{number}"
        )
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=arguments.json)
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        results = take_steps(
            steps,
            address=arguments.address,
            local=arguments.local,
            again=f"the same command with --run {folder.name} --resume",
            console=console,
        )
    findings = Findings(folder, "em", shared.task_name, results)
    findings.leave()
    title = f"{shared.task_name}: {rounds} rounds of EM"
    findings.show(title, as_json=arguments.json, console=console)
    return 0


def em_steps(
    config: RunConfig,
    *,
    rounds: int,
    name: Callable[[Kind, int], str],
    m_changes: Mapping[str, Any] | None = None,
) -> Iterator[EMStep]:
    """E, M, E, M, ... of `rounds` rounds; raises ConfigError, UserError.

    Args:
        config: of the first E-step; both kinds of step share it.
        name: of a step's run, from its kind and round.
        m_changes: of M-steps alone, after those of `em.overrides`.
    """
    for number in range(1, rounds + 1):
        run = name("E", number)
        yield EMStep(kind="E", round=number, run=run, config=config)
        policy, run = RunDirectory(run).adapter, name("M", number)
        m_config = m_step(config, policy=policy, changes=m_changes)
        yield EMStep(kind="M", round=number, run=run, config=m_config)
        config = config.changed({"lm.model": str(RunDirectory(run).model)})


def m_step(
    config: RunConfig, *, policy: Path, changes: Mapping[str, Any] | None = None
) -> RunConfig:
    """The M-step of the policy in a folder; raises ConfigError.

    Args:
        config: of the E-step.
        changes: of M-steps alone, after those of `em.overrides`.
    """
    of_file = parse_overrides(config.em.overrides, "em.overrides")
    fixed = {"learner.objective": "joint", "em.policy": str(policy)}
    return config.changed(_RESET | of_file | dict(changes or {}) | fixed)


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
        UserError: stopped on request, with steps left; or a step that is done has other settings.
        whatever `cluster.commands.train.train` raises.
    """
    results = []
    for step in steps:
        directory = RunDirectory(step.run)
        scores = finished(directory, step.config)
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
        if scores.after is None:
            raise UserError(f"stopped in {step.title}; {again} goes on")
        # What an M-step leaves is another LM, and was measured after the policy.
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
