"""The configuration of a run: one TOML file, checked whole before anything starts.

Imports no torch and no ray: reading and rejecting a file takes milliseconds.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.config import ActorConfig
from buffer.config import BufferConfig
from learner.config import LearnerConfig
from lm.config import LMConfig, LoRAConfig
from reward.config import RewardConfig
from tasks.config import TaskConfig

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A configuration that cannot be used; lists every error at once."""


class Placement(BaseModel):
    """What one process of a kind takes of the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpus: float = Field(default=0.5, ge=0, description="Ray CPUs reserved for each process")
    gpus: float = Field(default=0.0, ge=0, description="Ray GPUs, fractions allowed")
    threads: int = Field(default=1, gt=0, description="compute threads of each process")


class ClusterConfig(BaseModel):
    """How many processes there are, where they fit, and how long one waits for another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    actors: int = Field(default=1, gt=0, description="rollout actors")
    cpus: int | None = Field(
        default=None, gt=0, description="CPUs that Ray may count on this machine; None: its cores"
    )
    dashboard: bool = Field(default=False, description="start Ray's dashboard with a local Ray")
    actor_placement: Placement = Placement()
    reward_placement: Placement = Placement()
    learner_placement: Placement = Placement()
    time_limit_s: float | None = Field(
        default=None, gt=0, description="training ends after this time even if steps are left"
    )
    start_timeout_s: float = Field(default=240.0, gt=0, description="for one part to come up")
    answer_timeout_s: float = Field(default=60.0, gt=0, description="for one small answer")
    silence_timeout_s: float = Field(
        default=120.0, gt=0, description="after which a part that does not answer is replaced"
    )
    stop_timeout_s: float = Field(default=60.0, gt=0, description="for all parts to end in order")
    max_restarts: int = Field(default=10, ge=0, description="replacements of one part")


class EvaluationConfig(BaseModel):
    """How the policy is measured before and after training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    votes: int = Field(default=10, gt=0, description="rationales sampled for one item")
    temperature: float = Field(default=0.1, gt=0, description="at which they are sampled")
    max_items: int | None = Field(
        default=None, gt=0, description="items of each test set; None: all of them"
    )
    examples: int = Field(default=4, ge=0, description="rationales shown of each test set")


class RunConfig(BaseModel):
    """Everything that determines a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, description="of every random generator of the run")
    task: TaskConfig
    lm: LMConfig
    lora: LoRAConfig = LoRAConfig()
    actors: ActorConfig = ActorConfig()
    reward: RewardConfig = RewardConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply `section.key=value` overrides, and check the result.

    Raises:
        FileNotFoundError: no such file, here or in the project.
        ConfigError: not TOML, or keys and values that do not fit; names each of them.
    """
    found = find_file(path)
    try:
        tree = tomllib.loads(found.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{found}: not TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error))
        raise ConfigError(f"{found}: the configuration cannot be used:\n{lines}") from error
    return config.model_copy(
        update={"lm": config.lm.model_copy(update={"model": _locate_model(config.lm.model)})}
    )


def find_file(path: str) -> Path:
    """The file at `path`, seen from here or from the project's own folder."""
    for candidate in (Path(path), PROJECT_ROOT / path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no file {path!r} in {Path.cwd()} or {PROJECT_ROOT}; "
        f"the project's own are {', '.join(_shipped_configs())}"
    )


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as JSON, secrets masked."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _locate_model(model: str) -> str:
    """A folder of the project where there is one of that name, else `model` itself (a hub id)."""
    inside = PROJECT_ROOT / model
    return str(inside) if not Path(model).exists() and inside.is_dir() else model


def _shipped_configs() -> list[str]:
    return sorted(str(p.relative_to(PROJECT_ROOT)) for p in PROJECT_ROOT.glob("tasks/*.toml"))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: lm.model=gpt2
    *sections, last = key.strip().split(".")
    place = tree
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    place[last] = value


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            yield f"{key}: unknown key (= {problem['input']!r}){hint}"
        elif problem["type"] == "missing":
            yield f"{key}: missing; it has no default"
        else:
            yield f"{key} = {problem['input']!r}: {problem['msg']}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        fields: Mapping[str, Any] = getattr(model, "model_fields", {})
        if part in fields:
            model = fields[str(part)].annotation
    return sorted(getattr(model, "model_fields", {}))
