"""What an actor needs from the rest of the system: behind Ray, or directly in one process."""

from collections.abc import Sequence
from typing import Protocol

from buffer.trajectory import Trajectory
from lm.sampling import Completion, Request


class Policy(Protocol):
    """The sampler: ours by default; another engine can stand here."""

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""

    def load(self, adapter: bytes) -> None:
        """Take these adapter weights from now on."""


class TrajectorySink(Protocol):
    """The replay buffer as an actor sees it."""

    def add(self, group: Sequence[Trajectory]) -> object:
        """Store one group; when this returns, the buffer owns it."""

    def depth(self) -> int:
        """Groups stored that the learner has not drawn yet."""
