"""What an actor needs from the rest of the system: behind Ray, or directly in one process."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from buffer.trajectory import Trajectory
from lm.sampling import Completion, Ended, Request
from lm.tools import ToolFault, drawn_again, unfailing
from reward.request import ScoreItem


class RolloutEngine(Protocol):
    """What samples from the policy: see `actors.engine`."""

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Let requests wait for places; their numbers. Raises ValueError for what has no room."""

    def poll(self) -> list[Ended]:
        """Sample on; what has ended since, by number of its request, often nothing."""

    def load(self, adapter: bytes) -> None:
        """Take these adapter weights for all that is submitted from now on; nothing is under way.

        Raises AdapterMismatch.
        """

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """As `attempt`, all of them; raises what a tool raised where it ended one twice."""
        return unfailing(self.attempt(requests))

    def attempt(self, requests: Sequence[Request]) -> list[Completion | ToolFault]:
        """`drawn_again`, while nothing else is under way; where it raises, rows are left over, and
        this engine is of no more use."""
        return drawn_again(requests, self.submit, self.poll)


class PendingScores(Protocol):
    """A scoring under way."""

    def done(self) -> bool:
        """Whether `result` would not wait, or is needed to ask again."""

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
