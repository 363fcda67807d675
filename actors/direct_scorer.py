"""Rewards without a reward model: a function of the completion, computed where it is asked."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.protocols import PendingScores
from reward.request import ScoreItem


class DirectScorer:
    """A Scorer for tasks whose log-reward is a function.

    Args:
        log_reward: log R in nats at every stop state of an item, [S].
    """

    def __init__(self, log_reward: Callable[[ScoreItem], NDArray[np.float32]]) -> None:
        self._log_reward = log_reward

    def submit(self, items: Sequence[ScoreItem]) -> PendingScores:
        """Score at once."""
        return _Scored([self._log_reward(item) for item in items])


class _Scored:
    def __init__(self, log_rewards: list[NDArray[np.float32]]) -> None:
        self._log_rewards = log_rewards

    def result(self, timeout_s: float) -> list[NDArray[np.float32]]:
        return self._log_rewards
