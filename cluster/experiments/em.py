"""The verb `em`: rounds of an E-step and an M-step, each an ordinary run; and `mstep`, one alone.

    E-step  a policy q(Z | X) is trained towards p(Z | X, Y) of the LM as it is now
    M-step  the LM is trained to expect Z Y after X, Z ~ q(Z | X): it maximises E_q[log p(Z Y | X)]

What an M-step leaves in its folder `model` is the LM of everything in the next round: of the
rewards, of the policy's base and of the answers.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.commands.train import train_and_show
from cluster.config.file import load_config, parse_overrides
from cluster.config.schema import RunConfig
from cluster.experiments.findings import Findings
from cluster.experiments.suite import Step, Suite
from cluster.run.directory import RunDirectory, find_run

Kind = Literal["E", "M"]
# Of other objectives or of another base, and meaningless to an M-step's.
_RESET = {
    "learner.subtb_lambda": 1.0,
    "learner.normalisation": "batch",
    "learner.log_z": "group",
    "learner.start_from": None,
}


def run(arguments: argparse.Namespace) -> int:
    """Run the steps that are missing, then show and write how the LM went along; of `mstep`, which
    names a run, the M-step of its policy alone."""
    if "of" in arguments:
        policy = find_run(arguments.of)
        shared = load_config(str(policy.config_file), arguments.overrides)
        config = m_step(shared, policy=policy.adapter)
        return train_and_show(config, arguments, stem=f"{policy.name}-m")
    shared = load_config(arguments.config, arguments.overrides)
    rounds = arguments.rounds or shared.em.rounds
    suite = Suite(arguments, stem=f"em-{shared.task_name}", endings=r"[em]\d+")

    def name(kind: Kind, number: int) -> str:
        return f"{suite.folder.name}-{kind.lower()}{number}"

    steps = list(em_steps(shared, rounds=rounds, name=name))
    with suite.begun():
        results = suite.take(steps)
    findings = Findings(suite.folder, "em", shared.task_name, results)
    findings.leave()
    title = f"{shared.task_name}: {rounds} rounds of EM"
    findings.show(title, as_json=arguments.json, console=suite.console)
    return 0


def em_steps(
    config: RunConfig,
    *,
    rounds: int,
    name: Callable[[Kind, int], str],
    m_changes: Mapping[str, Any] | None = None,
) -> Iterator[Step]:
    """E, M, E, M, ... of `rounds` rounds; raises UserError.

    Args:
        config: of the first E-step; both kinds of step share it.
        name: of a step's run, from its kind and round.
        m_changes: of M-steps alone, after those of `em.overrides`.
    """
    for number in range(1, rounds + 1):
        run = name("E", number)
        yield Step(f"E-step {number}", run, config)
        policy, run = RunDirectory(run).adapter, name("M", number)
        yield Step(f"M-step {number}", run, m_step(config, policy=policy, changes=m_changes))
        model = str(RunDirectory(run).model)
        config = config.changed({"lm.model": model, "learner.start_from": None})


def m_step(
    config: RunConfig, *, policy: Path, changes: Mapping[str, Any] | None = None
) -> RunConfig:
    """The M-step of the policy in a folder; raises UserError.

    Args:
        config: of the E-step.
        changes: of M-steps alone, after those of `em.overrides`.
    """
    of_file = parse_overrides(config.em.overrides, "em.overrides")
    fixed = {"learner.objective": "joint", "em.policy": str(policy)}
    return config.changed(_RESET | of_file | dict(changes or {}) | fixed)
