"""From prompts to completions to trajectories: one batch of rollouts, free of any process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.config import ActorConfig
from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from buffer.trajectory import Trajectory
from lm.sampling import Completion, Request
from reward.request import ScoreItem

# Groups of one batch differ in time by this, which unix seconds in float64 still resolve: the
# buffer takes equal bytes for one group sent twice, and a peaked policy samples equal groups.
_GROUP_APART_S = 1e-6

IsCorrect = Callable[[Prompt, Sequence[int]], bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """One prompt and the temperature at which its whole group is sampled."""

    prompt: Prompt
    temperature: float

    @property
    def behaviour(self) -> str:
        return "on_policy" if self.temperature == 1.0 else "tempered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """A sampled batch: `completions[g]` belongs to `plans[g]`; every group has the same size."""

    plans: tuple[GroupPlan, ...]
    completions: tuple[tuple[Completion, ...], ...]
    policy_version: int
    sampled_s: float  # unix seconds

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions, tool output included."""
        return sum(len(c.tokens) for group in self.completions for c in group)


def plan_groups(
    prompts: Sequence[Prompt], config: ActorConfig, rng: np.random.Generator
) -> tuple[GroupPlan, ...]:
    """Choose each group's behaviour: the policy itself, or a tempered one (paper, appendix B).

    A group is sampled at temperature 1 with probability `on_policy_share`, else at one drawn
    uniformly from [temperature_low, temperature_high].
    """
    on_policy = rng.random(len(prompts)) < config.on_policy_share
    tempered = rng.uniform(config.temperature_low, config.temperature_high, len(prompts))
    return tuple(
        GroupPlan(prompt=prompt, temperature=1.0 if own else float(temperature))
        for prompt, own, temperature in zip(prompts, on_policy, tempered, strict=True)
    )


def requests(plans: Sequence[GroupPlan], group_size: int) -> list[Request]:
    """`group_size` sampling requests for each group, group by group."""
    return [
        Request(prompt=plan.prompt.prompt, temperature=plan.temperature)
        for plan in plans
        for _ in range(group_size)
    ]


def score_items(rollouts: Rollouts, query: RewardQuery) -> list[ScoreItem]:
    """What must be scored, one item for each completion, group by group."""
    return [
        query.item(plan.prompt, completion.tokens, completion.stops)
        for plan, group in zip(rollouts.plans, rollouts.completions, strict=True)
        for completion in group
    ]


def trajectories(
    rollouts: Rollouts,
    log_rewards: Sequence[NDArray[np.float32]],
    *,
    task: str,
    actor: str,
    is_correct: IsCorrect,
) -> list[list[Trajectory]]:
    """Join completions with their log-rewards ([S] nats each, in order): one list a group."""
    scores = iter(log_rewards)
    return [
        [
            Trajectory(
                task=task,
                prompt_key=plan.prompt.key,
                prompt=np.array(plan.prompt.prompt, dtype=np.int32),
                answer=np.array(plan.prompt.answer, dtype=np.int32),
                completion=completion.tokens,
                from_tool=completion.from_tool,
                stops=completion.stops,
                log_reward=next(scores),
                behaviour_log_prob=completion.log_q_token,
                behaviour_log_stop=completion.log_q_stop,
                policy_version=rollouts.policy_version,
                behaviour=plan.behaviour,
                temperature=plan.temperature,
                actor=actor,
                created_s=rollouts.sampled_s + number * _GROUP_APART_S,
                correct=is_correct(plan.prompt, completion.tokens.tolist()),
            )
            for completion in group
        ]
        for number, (plan, group) in enumerate(
            zip(rollouts.plans, rollouts.completions, strict=True)
        )
    ]
