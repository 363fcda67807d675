"""The methods of a comparison: what each changes in a run's configuration, and nothing else.

docs/compare.md says what each is. `_T0.9` behind a name is another T than the file's; `_5x` writes
five times as many sentences and keeps the likeliest that differ; `_tokens` takes as many steps as
bring the method to the LM tokens of `gflownet`, instead of as many as it takes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.file import parse_overrides
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.experiments.em import em_steps
from cluster.experiments.suite import Member, Step

BASE, GFLOWNET, EM = "base", "gflownet", "gflownet_em"
TRAINED = ("sft", "ppo", GFLOWNET, EM)
_DECODED: Mapping[str, Mapping[str, Any]] = {
    "sample": {"evaluation.temperature": 1.0},
    "tempered": {},
    "nucleus": {"evaluation.temperature": 1.0, "evaluation.top_p": 0.95},
    "greedy": {"evaluation.decoding": "beam", "evaluation.samples": 1},
    "beam": {"evaluation.decoding": "beam"},
    "diverse_beam": {"evaluation.decoding": "diverse_beam"},
}
METHODS = (BASE, *TRAINED, *_DECODED)
# Of the names of a comparison's runs: title and seed or trial, and of EM the step before the last.
ENDINGS = rf"({'|'.join(METHODS)})[\w.]*-(trial)?\d+(-[em]\d+)?"
_AT_TEMPERATURES = ("ppo", "gflownet", "tempered")
_AT_EQUAL_TOKENS = ("sft", "ppo")
_TOKENS = "_tokens"
_NAME = re.compile(
    r"(?P<name>[a-z_]*?[a-z])(_T(?P<temperature>\d+(\.\d+)?))?(_(?P<times>\d+)x)?"
    rf"(?P<tokens>{_TOKENS})?"
)


@dataclass(frozen=True, slots=True)
class Method:
    """What a method's name says."""

    name: str  # one of METHODS
    temperature: float | None  # T of the reward; None: the file's
    times: int  # sentences are written so many times as many
    equal_tokens: bool = False  # steps until gflownet's LM tokens, instead of its steps

    @property
    def trained(self) -> bool:
        """Whether it takes steps, and leaves an adapter."""
        return self.name in TRAINED


def method(title: str) -> Method:
    """Read a name such as `beam`, `tempered_T0.9` or `diverse_beam_5x`; raises UserError."""
    read = _NAME.fullmatch(title)
    if read is None or read["name"] not in METHODS:
        raise UserError(f"no method {title!r}; there are {', '.join(METHODS)}")
    name, temperature, times = read["name"], read["temperature"], int(read["times"] or 1)
    several = [other for other in _DECODED if other != "greedy"]
    fault = ""
    if temperature is not None and (name not in _AT_TEMPERATURES or not float(temperature)):
        fault = f"_T with a temperature above 0 is for {', '.join(_AT_TEMPERATURES)}"
    elif read["times"] and (name not in several or times < 2):
        fault = (
            f"_2x and more are for {', '.join(several)}, which write several sentences without "
            "training"
        )
    elif read["tokens"] and name not in _AT_EQUAL_TOKENS:
        fault = (
            f"{_TOKENS} is for {', '.join(_AT_EQUAL_TOKENS)}, which learn otherwise than gflownet"
        )
    if fault:
        raise UserError(f"no method {title!r}: {fault}")
    at = None if temperature is None else float(temperature)
    return Method(name, at, times, equal_tokens=read["tokens"] is not None)


def measured_against(title: str) -> tuple[str, str]:
    """What tells the steps of a method at equal LM tokens: itself at equal steps, and gflownet."""
    own = title.removesuffix(_TOKENS)
    return own, GFLOWNET + own.removeprefix(method(title).name)


def method_config(
    shared: RunConfig, *, title: str, seed: int, steps: int | None = None
) -> RunConfig:
    """The run of one method, not gflownet_em, and seed; raises UserError.

    Equal for all: LM, adapter, prompts, legal tokens, tool, and trajectories of each step but where
    a prompt has too few to replay. Equal for all but those at equal LM tokens, whose `steps` are
    given: optimizer steps, and with them trajectories. The time limit is off, because steps that it
    cut would not be equal. What is not trained is measured with draws of its own for each seed.
    """
    named = method(title)
    temperature = named.temperature or shared.learner.trained_temperature(shared.compare.steps)
    changes: dict[str, Any] = {
        "seed": seed,
        "learner.steps": shared.compare.steps or shared.learner.steps,
        **_own(named.name, shared, temperature),
    }
    if not named.trained:
        changes["evaluation.seed"] = shared.evaluation.seed + seed
    if named.temperature is not None:
        changes["learner.reward_temperature.end"] = named.temperature
    if named.times > 1:
        changes["evaluation.candidates"] = named.times
    changes |= _overrides(title, shared) | {"cluster.time_limit_s": None}
    if steps is not None:
        changes["learner.steps"] = steps
    return shared.changed(changes)


def member(
    shared: RunConfig, title: str, *, seed: int, run: str, gflownet: str, steps: int | None = None
) -> Member:
    """A method with a seed; raises UserError.

    Args:
        run: the name of its own run.
        gflownet: ... and of that of gflownet with the same seed.
        steps: optimizer steps, of a method at equal LM tokens.
    """
    shown = f"{title}, seed {seed} (run {run})"
    if title == EM:
        return Member(title, shown, em_method_steps(shared, seed=seed, first=gflownet, own=run))
    config = method_config(shared, title=title, seed=seed, steps=steps)
    return Member(title, shown, (Step(shown, run, config, method(title).trained),))


def em_method_steps(shared: RunConfig, *, seed: int, first: str, own: str) -> tuple[Step, ...]:
    """The runs of gflownet_em and a seed: `em.rounds` rounds, gflownet the first E-step.

    What `compare.overrides` says of gflownet_em is of its M-steps. Raises ConfigError.

    Args:
        first: the name of gflownet's run.
        own: ... and of the last M-step's.
    """

    def name(kind: str, number: int) -> str:
        if (kind, number) == ("E", 1):
            return first
        last = (kind, number) == ("M", shared.em.rounds)
        return own if last else f"{own}-{kind.lower()}{number}"

    config = method_config(shared, title=GFLOWNET, seed=seed)
    changes = _overrides(EM, shared)
    return tuple(em_steps(config, rounds=shared.em.rounds, name=name, m_changes=changes))


def said_of(title: str, shared: RunConfig) -> tuple[str, ...]:
    """`compare.overrides` of the method as it is titled, else of all of its name."""
    known = shared.compare.overrides
    titles = (title, title.removesuffix(_TOKENS), method(title).name)
    return next((known[each] for each in titles if each in known), ())


def _overrides(title: str, shared: RunConfig) -> dict[str, Any]:
    """The same by dotted key; raises UserError: something is said of a method that there is not."""
    for key in shared.compare.overrides:
        try:
            method(key)
        except UserError as error:
            raise UserError(f"compare.overrides: {error}") from error
    return parse_overrides(said_of(title, shared), f"compare.overrides.{title}")


def _own(name: str, shared: RunConfig, temperature: float) -> Mapping[str, Any]:
    """What makes a method that method."""
    match name:
        case "base":
            return {"evaluation.shots": shared.compare.shots}
        case "sft":
            return {"learner.objective": "sft"}
        case "ppo":
            return {
                "learner.objective": "ppo",
                "learner.replayed_per_group": 0,
                "actors.group_size": shared.actors.group_size + shared.learner.replayed_per_group,
                "actors.on_policy_share": 1.0,
            }
        case "gflownet" | "gflownet_em":
            return {} if shared.learner.traits.uses_log_z else {"learner.objective": "subtb"}
        case "tempered":
            return {"evaluation.temperature": temperature}
        case _:
            return _DECODED[name]
