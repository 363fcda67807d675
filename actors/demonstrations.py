"""Demonstrations into the replay buffer: known rationales, scored like any other trajectory."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.prompts import Prompt
from actors.protocols import RolloutEngine, Scorer
from actors.reward_query import RewardQuery
from actors.rollout import IsCorrect, join
from buffer.trajectory import Trajectory
from lm.actions import ActionSpace
from lm.sampling import Completion, Request
from lm.tools import ToolFault
from reward.request import ScoreItem

_log = logging.getLogger(__name__)

DEMONSTRATION = "demonstration"  # behaviour of the records
_ORIGIN = {"actor": "data", "policy_version": 0, "behaviour": DEMONSTRATION, "temperature": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A rationale Z that the data file gives for a prompt."""

    prompt: Prompt
    completion: tuple[int, ...]  # token ids of Z, tool output included
    from_tool: tuple[bool, ...]  # which of them a tool inserted


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """Behind what the LM is to write rationales of a prompt: a text that tells it more."""

    prompt: Prompt
    shown: tuple[int, ...]  # token ids


def hinted_demonstrations(
    hints: Sequence[Hint], policy: RolloutEngine, *, draws: int
) -> list[Demonstration]:
    """What `policy` writes behind each hint, in so many draws at temperature 1: the different ones.

    The objectives learn off policy, so that it need not be the policy's own in front of X. What a
    tool ended twice is left out; raises what it raised where it ended all, or too many in a row.
    """
    drawn = [hint for hint in hints for _ in range(draws)]
    ended = policy.attempt([Request(prompt=hint.shown, temperature=1.0) for hint in drawn])
    tell_faults(ended, "draws behind hints")
    found = [
        Demonstration(
            prompt=hint.prompt,
            completion=tuple(completion.tokens.tolist()),
            from_tool=tuple(completion.from_tool.tolist()),
        )
        for hint, completion in zip(drawn, ended, strict=True)
        if isinstance(completion, Completion)
    ]
    return list(dict.fromkeys(found))


def tell_faults(ended: Sequence[Completion | ToolFault], drawn: str) -> None:
    """Warn that tools ended some of `drawn`; raises what one raised where they ended all."""
    faults = [one for one in ended if isinstance(one, ToolFault)]
    if faults and len(faults) == len(ended):
        raise faults[0].error
    if faults:
        told = (len(faults), len(ended), drawn, faults[0].reason)
        _log.warning("a tool ended %d of %d %s: %s", *told)


class SeedSink(Protocol):
    """The replay buffer as the seeder sees it."""

    def seed(self, trajectories: Sequence[Trajectory]) -> object: ...


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

    In requests of `token_budget` tokens, each of them waited for, so that any number only takes its
    time. Doing it again changes nothing: the buffer knows them by content.

    Raises IllegalCompletion for what the policy could never produce, before any is stored, and
    TimeoutError or RuntimeError where a scoring failed, with what came before it stored.
    """
    completions = [_as_sampled(demonstration, actions) for demonstration in demonstrations]
    items = [
        query.item(demonstration.prompt, completion.tokens, completion.stops)
        for demonstration, completion in zip(demonstrations, completions, strict=True)
    ]
    for portion in _portions(items, token_budget):
        scores = scorer.submit(query.asked(items[portion])).result(timeout_s)
        log_rewards = query.judged(scores)
        scored = zip(demonstrations[portion], completions[portion], log_rewards, strict=True)
        buffer.seed([_record(*parts, task, is_correct) for parts in scored])
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
    """As trajectories for a learner that asks for no reward, else IllegalCompletion."""
    found = []
    for demonstration in demonstrations:
        completion = _as_sampled(demonstration, actions)
        zeros_S = np.zeros(len(completion.stops), dtype=np.float32)
        found.append(_record(demonstration, completion, zeros_S, task, is_correct))
    return found


def _as_sampled(demonstration: Demonstration, actions: ActionSpace) -> Completion:
    """The completion with its stop states, log q 0; raises IllegalCompletion."""
    actions.check(demonstration.completion, demonstration.from_tool)
    stops_S = actions.stop_positions(demonstration.completion, demonstration.from_tool)
    return Completion(
        tokens=np.array(demonstration.completion, dtype=np.int32),
        from_tool=np.array(demonstration.from_tool, dtype=np.bool_),
        log_q_token=np.zeros(len(demonstration.completion), dtype=np.float32),
        stops=stops_S,
        log_q_stop=np.zeros(len(stops_S), dtype=np.float32),
    )


def _record(
    demonstration: Demonstration,
    completion: Completion,
    log_reward_S: NDArray[np.float32],
    task: str,
    is_correct: IsCorrect,
) -> Trajectory:
    origin = _ORIGIN | {"task": task, "created_s": time.time()}
    return join(demonstration.prompt, completion, log_reward_S, is_correct, **origin)
