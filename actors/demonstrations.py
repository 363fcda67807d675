"""Demonstrations into the replay buffer: known rationales, scored like any other trajectory."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.prompts import Prompt
from actors.protocols import Scorer
from actors.reward_query import RewardQuery
from actors.rollout import IsCorrect
from buffer.trajectory import Trajectory
from lm.actions import ActionSpace
from reward.request import ScoreItem


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A rationale Z that the data file gives for a prompt."""

    prompt: Prompt
    completion: tuple[int, ...]  # token ids of Z, tool output included
    from_tool: tuple[bool, ...]  # which of them a tool inserted


class SeedSink(Protocol):
    """The replay buffer as the seeder sees it."""

    def seed(self, trajectories: Sequence[Trajectory]) -> object:
        """Store for replay; what is stored already stays as it is."""
        ...


def seed_demonstrations(
    demonstrations: Sequence[Demonstration],
    *,
    task: str,
    actions: ActionSpace,
    query: RewardQuery,
    is_correct: IsCorrect,
    scorer: Scorer,
    buffer: SeedSink,
    token_budget: int,
    timeout_s: float,
) -> int:
    """Score the demonstrations and put them into replay; how many.

    They are scored and stored portion by portion, so that any number of them, and any speed of the
    reward model, only takes its time. Doing it again changes nothing: the buffer knows them by
    content.

    Args:
        token_budget: tokens that are scored in one request; a single demonstration may exceed it.
        timeout_s: longest wait for the rewards of one request.

    Raises:
        IllegalCompletion: a demonstration that the policy could never produce; nothing was stored.
        TimeoutError, RuntimeError: a scoring failed; what came before it was stored.
    """
    stops = [_stops(demonstration, actions) for demonstration in demonstrations]
    items = [
        query.item(demonstration.prompt, demonstration.completion, stops_S)
        for demonstration, stops_S in zip(demonstrations, stops, strict=True)
    ]
    for portion in _portions(items, token_budget):
        log_rewards = scorer.submit(items[portion]).result(timeout_s)
        buffer.seed(
            [
                _trajectory(demonstration, stops_S, log_reward_S, task=task, is_correct=is_correct)
                for demonstration, stops_S, log_reward_S in zip(
                    demonstrations[portion], stops[portion], log_rewards, strict=True
                )
            ]
        )
    return len(items)


def _portions(items: Sequence[ScoreItem], token_budget: int) -> Iterator[slice]:
    """Consecutive items, each portion of at most `token_budget` tokens or of one item."""
    first, tokens = 0, 0
    for place, item in enumerate(items):
        size = item.context.size + item.completion.size + item.stops.size * item.answer.size
        if place > first and tokens + size > token_budget:
            yield slice(first, place)
            first, tokens = place, 0
        tokens += size
    if items:
        yield slice(first, len(items))


def unscored_demonstrations(
    demonstrations: Sequence[Demonstration],
    *,
    task: str,
    actions: ActionSpace,
    is_correct: IsCorrect,
) -> list[Trajectory]:
    """The demonstrations as trajectories for a learner that asks for no reward: theirs says 0.

    Raises:
        IllegalCompletion: a demonstration that the policy could never produce.
    """
    return [
        _trajectory(
            demonstration,
            stops_S := _stops(demonstration, actions),
            np.zeros(len(stops_S), dtype=np.float32),
            task=task,
            is_correct=is_correct,
        )
        for demonstration in demonstrations
    ]


def _trajectory(
    demonstration: Demonstration,
    stops_S: NDArray[np.int32],
    log_reward_S: NDArray[np.float32],
    *,
    task: str,
    is_correct: IsCorrect,
) -> Trajectory:
    prompt, completion = demonstration.prompt, demonstration.completion
    return Trajectory(
        task=task,
        prompt_key=prompt.key,
        prompt=np.array(prompt.prompt, dtype=np.int32),
        answer=np.array(prompt.answer, dtype=np.int32),
        completion=np.array(completion, dtype=np.int32),
        from_tool=np.array(demonstration.from_tool, dtype=np.bool_),
        stops=stops_S,
        log_reward=log_reward_S,
        behaviour_log_prob=np.zeros(len(completion), dtype=np.float32),
        behaviour_log_stop=np.zeros(len(stops_S), dtype=np.float32),
        policy_version=0,
        behaviour="demonstration",
        temperature=1.0,
        actor="data",
        created_s=time.time(),
        correct=is_correct(prompt, completion),
    )


def _stops(demonstration: Demonstration, actions: ActionSpace) -> NDArray[np.int32]:
    actions.check(demonstration.completion, demonstration.from_tool)
    return actions.stop_positions(demonstration.completion, demonstration.from_tool)
