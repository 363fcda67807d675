"""What an actor needs from the rest of the system: behind Ray, or directly in one process."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from buffer.trajectory import Trajectory
from lm.sampling import Completion, Request
from reward.request import ScoreItem


class RolloutEngine(Protocol):
    """What samples from the policy: see `actors.engine`."""

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""

    def load(self, adapter: bytes) -> None:
        """Take these adapter weights for all that is sampled from now on."""


class PendingScores(Protocol):
    """A scoring under way."""

    def result(self, timeout_s: float, /) -> list[NDArray[np.float32]]:
        """Log-rewards [S] in nats for each submitted item, else TimeoutError or RuntimeError."""


class Scorer(Protocol):
    """Rewards under the frozen LM."""

    def submit(self, items: Sequence[ScoreItem]) -> PendingScores:
        """Returns at once."""


class TrajectorySink(Protocol):
    """The replay buffer as an actor sees it."""

    def add(self, group: Sequence[Trajectory]) -> object:
        """Store one group; when this returns, the buffer owns it."""

    def depth(self) -> int:
        """Groups stored that the learner has not drawn yet."""
