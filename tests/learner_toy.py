"""A learner on a task small enough to enumerate: strings of tokens 1 and 2 after two prompts."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from buffer.replay import DrawRequest, Group
from buffer.trajectory import Trajectory
from learner.checkpoint import Checkpoints
from learner.config import LearnerConfig
from learner.engine import Engine, TorchEngine
from learner.learner import Learner
from learner.log_z import attach_log_z
from learner.objectives.base import Objective
from learner.objectives.subtb import SubTB
from lm.actions import ActionSpace
from lm.config import LoRAConfig
from lm.model import LanguageModel, attach_adapter, freeze
from tests.tiny_lm import VOCAB_SIZE, tiny_config

ACTIONS = ActionSpace(stop_token=0, legal_tokens=(1, 2), min_len=1, max_len=3)
PROMPTS = {"short": [5, 6], "long": [7, 8, 9, 10], "other": [11, 12, 13]}
STRINGS = [
    string
    for length in range(ACTIONS.min_len, ACTIONS.max_len + 1)
    for string in itertools.product((1, 2), repeat=length)
]


def make_policy() -> Any:
    """The same tiny model with the same fresh adapter at every call."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config("llama"))
    # At the default initialisation the frozen output head bounds every logit by about 0.6.
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    freeze(base)
    language_model = LanguageModel(model=base, tokenizer=None, fingerprint="tiny")
    return attach_adapter(language_model, LoRAConfig(rank=4, alpha=8.0), seed=1)


def log_reward_of(prompt_key: str, prefix: Sequence[int]) -> float:
    seed = [ord(letter) for letter in prompt_key] + list(prefix)
    return float(np.random.default_rng(seed).normal(-20, 1.5))


def make_trajectory(prompt_key: str, string: Sequence[int], **changes: Any) -> Trajectory:
    """Scored under the toy's reward; its recorded log q are zeros unless given."""
    from_tool = np.zeros(len(string), dtype=np.bool_)
    stops = ACTIONS.stop_positions(string, from_tool)
    rewards = [log_reward_of(prompt_key, string[:t]) for t in stops]
    fields: dict[str, Any] = {
        "task": "toy",
        "prompt_key": prompt_key,
        "prompt": np.array(PROMPTS[prompt_key], dtype=np.int32),
        "answer": np.zeros(0, dtype=np.int32),
        "completion": np.array(string, dtype=np.int32),
        "from_tool": from_tool,
        "stops": stops,
        "log_reward": np.array(rewards, dtype=np.float32),
        "behaviour_log_prob": np.zeros(len(string), dtype=np.float32),
        "behaviour_log_stop": np.zeros(len(stops), dtype=np.float32),
        "policy_version": 0,
        "behaviour": "on_policy",
        "temperature": 1.0,
        "actor": "a0",
        "created_s": 1.0,
        "correct": None,
    }
    return Trajectory(**(fields | changes))


class UniformReplay:
    """Groups of uniformly drawn strings: a behaviour that no policy has, a function of `rng`."""

    def __init__(self, *, group_size: int = 6, prompts: Sequence[str] = tuple(PROMPTS)) -> None:
        self._group_size = group_size
        self._prompts = prompts

    def draw(self, request: DrawRequest) -> list[Group]:
        rng, num_replayed = request.rng, request.num_replayed

        def some(key: str, count: int) -> tuple[Trajectory, ...]:
            return tuple(
                make_trajectory(key, STRINGS[rng.integers(len(STRINGS))]) for _ in range(count)
            )

        keys = [self._prompts[n % len(self._prompts)] for n in range(request.num_groups)]
        return [
            Group(prompt_key=k, fresh=some(k, self._group_size), replayed=some(k, num_replayed))
            for k in keys
        ]

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Nothing is stored."""


class FixedReplay:
    """The same groups at every draw."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = list(groups)

    def draw(self, request: DrawRequest) -> list[Group]:
        return self._groups

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Nothing is stored."""


class Published:
    """Keeps what was published."""

    def __init__(self) -> None:
        self.adapters: list[tuple[bytes, int, str]] = []

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        self.adapters.append((data, version, checksum))


def make_config(**changes: Any) -> LearnerConfig:
    fields: dict[str, Any] = {
        "steps": 100,
        "groups_per_step": 3,
        "replayed_per_group": 2,
        "learning_rate": 0.01,
        "clip_norm": 10.0,
        "weight_decay": 0.01,
        "warmup_steps": 2,
    }
    return LearnerConfig(**(fields | changes))


def make_learner(
    *,
    replay: Any = None,
    weights: Any = None,
    folder: Path | None = None,
    identity: dict[str, str] | None = None,
    make_engine: Callable[[Any, LearnerConfig], Engine] = TorchEngine,
    objective: Objective | None = None,
    **changes: Any,
) -> tuple[Learner, Any]:
    """A learner and its model, alike at every call; of SubTB unless told otherwise."""
    model, config = make_policy(), make_config(**changes)
    log_z = attach_log_z(model) if config.log_z == "learned" else None
    checkpoints = None
    if folder is not None:
        checkpoints = Checkpoints(
            folder, identity=identity or {"base": "tiny"}, keep=config.checkpoints_kept
        )
    learner = Learner(
        model=model,
        actions=ACTIONS,
        replay=replay or UniformReplay(),
        engine=make_engine(model, config),
        objective=objective or SubTB(config.subtb_lambda, config.normalisation),
        config=config,
        weights=weights or Published(),
        rng=np.random.default_rng(3),
        checkpoints=checkpoints,
        log_z=log_z,
    )
    return learner, model


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


assert max(max(prompt) for prompt in PROMPTS.values()) < VOCAB_SIZE
