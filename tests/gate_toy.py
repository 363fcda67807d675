"""Honest and damaged samplers of the toy of `learner_toy`, and a gate before its learner."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buffer.replay import BufferStarved, DrawRequest, Group, Replay
from buffer.trajectory import Trajectory
from learner.agreement.gate import AgreementGate
from learner.agreement.policy_history import PastPolicies
from learner.agreement.quarantine import Quarantine
from learner.config import LearnerConfig
from lm.adapter import load_adapter_bytes
from lm.sampling import Request, Sampler
from tests.learner_toy import ACTIONS, PROMPTS, make_config, make_policy, make_trajectory


class ToySampler:
    """An actor's sampler, cache and all, that records what it does.

    Args:
        damage: standard deviation of what is added to the base's embedding in its memory.
    """

    def __init__(self, actor: str, *, seed: int = 0, damage: float = 0.0) -> None:
        self._actor = actor
        self._model = make_policy()
        self._generator = torch.Generator().manual_seed(seed)
        self._sampler = Sampler(self._model, ACTIONS, None, max_rows=16)
        embedding = self._model.get_input_embeddings().weight
        with torch.no_grad():
            noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed))
            embedding.add_(damage * noise)

    def load(self, adapter: bytes) -> None:
        load_adapter_bytes(self._model, adapter)

    def group(self, prompt_key: str, *, version: int, size: int = 4) -> tuple[Trajectory, ...]:
        """Completions of one prompt, under the weights that were loaded last."""
        requests = [Request(prompt=tuple(PROMPTS[prompt_key]))] * size
        return tuple(
            make_trajectory(
                prompt_key,
                drawn.tokens.tolist(),
                behaviour_log_prob=drawn.log_q_token,
                behaviour_log_stop=drawn.log_q_stop,
                policy_version=version,
                actor=self._actor,
            )
            for drawn in self._sampler.sample(requests, self._generator)
        )


class QueueReplay:
    """Groups in the order in which a test puts them; never waits."""

    def __init__(self, *groups: Group) -> None:
        self.groups = deque(groups)
        self.discarded: list[Trajectory] = []

    def draw(self, request: DrawRequest) -> list[Group]:
        if len(self.groups) < request.num_groups:
            raise BufferStarved(f"{len(self.groups)} of {request.num_groups} groups")
        return [self.groups.popleft() for _ in range(request.num_groups)]

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        self.discarded.extend(trajectories)


def make_gate(
    model: Any,
    folder: Path,
    *,
    config: LearnerConfig | None = None,
    warnings: list[str] | None = None,
    max_age: int = 16,
    replay: Replay | None = None,
    calibrated: bool = True,
) -> AgreementGate:
    """A gate; `calibrated`: its first draws are over, and it tolerates the most that it may."""
    gate = AgreementGate(
        replay=replay or QueueReplay(),
        model=model,
        actions=ACTIONS,
        past=PastPolicies(model, max_age=max_age),
        quarantine=Quarantine(folder),
        config=config or make_config(),
        warn=print if warnings is None else warnings.append,
    )
    if calibrated:
        gate.tolerance.restore({"draws": 3, "squares": {}})
    return gate


def as_group(
    fresh: Sequence[Trajectory], replayed: Sequence[Trajectory] = (), key: str | None = None
) -> Group:
    return Group(
        prompt_key=key or fresh[0].prompt_key, fresh=tuple(fresh), replayed=tuple(replayed)
    )


def draw(
    gate: AgreementGate, replay: Replay, version: int, num_groups: int, *, timeout_s: float = 60.0
) -> list[Group]:
    gate.replay = replay
    return gate.draw(
        DrawRequest(
            num_groups=num_groups,
            num_replayed=0,
            version=version,
            rng=np.random.default_rng(0),
            timeout_s=timeout_s,
        )
    )
