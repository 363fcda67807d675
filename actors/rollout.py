"""How each group is sampled, and the record that a scored completion becomes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.config import ActorConfig
from actors.prompts import Prompt
from buffer.trajectory import Trajectory
from lm.sampling import Completion
from lm.tools import ToolFault

IsCorrect = Callable[[Prompt, Sequence[int]], bool | None]


class GroupPlan(NamedTuple):
    """One prompt and the temperature at which its whole group is sampled."""

    prompt: Prompt
    temperature: float


def plan_groups(
    prompts: Sequence[Prompt], config: ActorConfig, rng: np.random.Generator
) -> list[GroupPlan]:
    """Each group at temperature 1 with probability `on_policy_share`, else at one drawn uniformly
    from [temperature_low, temperature_high] (Hu et al. 2024, appendix B)."""
    on_policy = rng.random(len(prompts)) < config.on_policy_share
    tempered = rng.uniform(config.temperature_low, config.temperature_high, len(prompts))
    return [
        GroupPlan(prompt, 1.0 if own else float(temperature))
        for prompt, own, temperature in zip(prompts, on_policy, tempered, strict=True)
    ]


@dataclass(slots=True, eq=False)
class AskedGroup:
    """A group that is being sampled, or has been."""

    plan: GroupPlan
    version: int  # of the policy
    number: int  # of its first request
    ended: list[Completion | ToolFault | None]  # None: under way
    created_s: float = 0.0  # when the last of it ended, in unix seconds

    @property
    def completions(self) -> list[Completion]:
        """Those that have ended, but for what tools ended."""
        return [one for one in self.ended if isinstance(one, Completion)]

    @property
    def faults(self) -> list[ToolFault]:
        """Where tools ended a completion."""
        return [one for one in self.ended if isinstance(one, ToolFault)]

    def trajectories(
        self, log_rewards: Sequence[NDArray[np.float32]], is_correct: IsCorrect, **origin: Any
    ) -> list[Trajectory]:
        """Their records; `log_rewards`: of each completion [S]; `origin`: see `join`."""
        prompt, temperature = self.plan
        return [
            join(
                prompt,
                completion,
                log_reward_S,
                is_correct,
                policy_version=self.version,
                behaviour="on_policy" if temperature == 1.0 else "tempered",
                temperature=temperature,
                created_s=self.created_s,
                **origin,
            )
            for completion, log_reward_S in zip(self.completions, log_rewards, strict=True)
        ]


def join(
    prompt: Prompt,
    completion: Completion,
    log_reward_S: NDArray[np.float32],
    is_correct: IsCorrect,
    **origin: Any,
) -> Trajectory:
    """The record of a completion; `origin`: the fields that say where it comes from."""
    return Trajectory(
        prompt_key=prompt.key,
        prompt=np.array(prompt.prompt, dtype=np.int32),
        answer=np.array(prompt.answer, dtype=np.int32),
        completion=completion.tokens,
        from_tool=completion.from_tool,
        stops=completion.stops,
        log_reward=log_reward_S,
        behaviour_log_prob=completion.log_q_token,
        behaviour_log_stop=completion.log_q_stop,
        correct=is_correct(prompt, completion.tokens.tolist()),
        **origin,
    )
