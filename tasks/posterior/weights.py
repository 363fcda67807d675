"""Log importance weights log w = log R(Z) / T - log q(Z ⊤ | X) of completions, nats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.model import CausalLM
from lm.sampling import Request
from lm.scoring import completion_log_probs
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem
from reward.terms import RewardTerms
from tasks.evaluation.context import Draw
from tasks.posterior.enumeration import LogWeight
from tasks.task import Task

Floats = NDArray[np.float64]
# [S] nats for each item, untempered.
LogReward = Callable[[Sequence[ScoreItem]], list[NDArray[np.float32]]]

# Completions of one scoring pass: bounds its logits, [rows, tokens, vocabulary].
ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A completion Z with the marks of what a tool inserted into it."""

    tokens: tuple[int, ...]  # stop token excluded
    from_tool: tuple[bool, ...]


def log_reward_of(
    task: Task, model: CausalLM, token_budget: int, terms: RewardTerms | None = None
) -> LogReward:
    """The task's own function where it has one, else the frozen LM `model`, with `terms` if any.

    Raises CheckFailed where a verifier does.
    """
    function = task.log_reward
    if function is not None:
        return lambda items: [function(item) for item in items]
    if terms is None:
        return lambda items: suffix_log_rewards(model, items, token_budget)
    return lambda items: terms.log_rewards(items, suffix_log_rewards(model, items, token_budget))


def draw_log_weights(draw: Draw, prompt: Prompt, count: int, log_weight: LogWeight) -> Floats:
    """log w of `count` independent completions of a policy at temperature 1, in the order drawn:
    [N]. log q is what the sampler recorded."""
    drawn = draw([Request(prompt=prompt.prompt)] * count)
    log_q_N = np.array([completion.log_q for completion in drawn])
    return log_weight([tuple(completion.tokens.tolist()) for completion in drawn]) - log_q_N


def log_weights(
    model: nn.Module,
    actions: ActionSpace,
    prompt: Prompt,
    completions: Sequence[Completed],
    log_weight: LogWeight,
) -> Floats:
    """log w of given completions, such as samples of the posterior, under the policy `model`: [M].

    Raises IllegalCompletion for one that the policy cannot produce.
    """
    log_q_M = log_probs(model, actions, prompt, completions)
    return log_weight([completion.tokens for completion in completions]) - log_q_M


@torch.inference_mode()
def log_probs(
    model: nn.Module, actions: ActionSpace, prompt: Prompt, completions: Sequence[Completed]
) -> Floats:
    """log q(Z ⊤ | X) of each, its final stop included: [M]. Equal ones are scored once."""
    known: dict[Completed, float] = {}
    distinct = sorted(set(completions), key=lambda completion: len(completion.tokens))
    for start in range(0, len(distinct), ROWS):
        rows = distinct[start : start + ROWS]
        scored = completion_log_probs(
            model,
            actions,
            [prompt.prompt] * len(rows),
            [completion.tokens for completion in rows],
            [completion.from_tool for completion in rows],
        )
        last_B = torch.tensor([len(row.tokens) for row in rows], device=scored.log_pf_BT.device)
        log_stop_B = scored.log_stop_BS.gather(1, last_B[:, None])[:, 0]
        log_q_B = scored.log_pf_BT.double().sum(dim=1) + log_stop_B.double()
        known.update(zip(rows, log_q_B.tolist(), strict=True))
    return np.array([known[completion] for completion in completions])


def log_rewards(
    completions: Sequence[tuple[int, ...]],
    prompts: Prompt | Sequence[Prompt],
    query: RewardQuery,
    log_reward: LogReward,
) -> Floats:
    """log R(Z ⊤) of each completion, untempered: [M]; equal ones of one prompt are scored once.

    Args:
        prompts: of each completion, or the one of all.
    """
    if isinstance(prompts, Prompt):
        prompts = [prompts] * len(completions)
    pairs = list(zip(prompts, completions, strict=True))
    distinct = list(dict.fromkeys(pairs))
    items = [query.item(x, z, np.array([len(z)], dtype=np.int32)) for x, z in distinct]
    log_r = query.judged(log_reward(query.asked(items)))
    known = dict(zip(distinct, log_r, strict=True))
    return np.array([float(known[pair][-1]) for pair in pairs])
