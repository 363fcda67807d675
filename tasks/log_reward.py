"""The log-reward of a task as one function, whoever computes it."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lm.model import CausalLM
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem
from tasks.task import Task

# [S] nats for each item, untempered.
LogReward = Callable[[Sequence[ScoreItem]], list[NDArray[np.float32]]]


def log_reward_of(task: Task, model: CausalLM, token_budget: int) -> LogReward:
    """The task's own function where it has one, else the frozen LM `model`.

    Args:
        token_budget: tokens of one padded micro-batch, at most.
    """
    function = task.log_reward
    if function is not None:
        return lambda items: [function(item) for item in items]
    return lambda items: suffix_log_rewards(model, items, token_budget)
