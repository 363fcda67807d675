"""The steps of expectation maximisation, each an ordinary run: what it changes in a configuration.

    E-step  a policy q(Z | X) is trained towards p(Z | X, Y) of the LM as it is now
    M-step  the LM is trained to expect Z Y behind X, Z ~ q(Z | X): it maximises E_q[log p(Z Y | X)]

What an M-step leaves in its folder `model` is the LM of everything in the next round: of the
rewards, of the policy's base and of the answers.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory

Kind = Literal["E", "M"]
# Of other objectives, and meaningless to an M-step's.
_RESET = ("learner.subtb_lambda=1.0", 'learner.normalisation="batch"', 'learner.log_z="group"')


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


def em_steps(
    path: str,
    overrides: Sequence[str],
    *,
    rounds: int,
    name: Callable[[Kind, int], str],
    m_overrides: Sequence[str] = (),
) -> Iterator[EMStep]:
    """E, M, E, M, ... of `rounds` rounds; raises ConfigError, BadRunName.

    Args:
        path: TOML file that both kinds of step share.
        name: of a step's run, from its kind and round.
        m_overrides: of M-steps, behind those of `em.overrides`.
    """
    model: list[str] = []
    for number in range(1, rounds + 1):
        run = name("E", number)
        config = load_config(path, [*overrides, *model])
        yield EMStep(kind="E", round=number, run=run, config=config)
        policy, run = RunDirectory(run).adapter, name("M", number)
        config = m_step(path, [*overrides, *model], policy=policy, own=m_overrides)
        yield EMStep(kind="M", round=number, run=run, config=config)
        model = [_set("lm.model", RunDirectory(run).model)]


def m_step(
    path: str, overrides: Sequence[str], *, policy: Path, own: Sequence[str] = ()
) -> RunConfig:
    """The M-step behind the policy in a folder; raises ConfigError.

    Args:
        path: TOML file of the E-step, or what it left as its own.
        own: overrides of M-steps alone, behind those of `em.overrides`.
    """
    of_file = load_config(path, overrides).em.overrides
    fixed = ['learner.objective="joint"', _set("em.policy", policy)]
    return load_config(path, [*overrides, *_RESET, *of_file, *own, *fixed])


def _set(key: str, folder: Path) -> str:
    return f"{key}={json.dumps(str(folder))}"
