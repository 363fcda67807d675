"""What the learner needs from outside: where groups come from, and where adapters go."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from buffer.replay import Group
from buffer.trajectory import Trajectory


class Replay(Protocol):
    """Where groups come from: `buffer.replay.ReplayBuffer`."""

    def draw(
        self,
        *,
        num_groups: int,
        num_replayed: int,
        version: int,
        rng: np.random.Generator,
        timeout_s: float,
        stop: Callable[[], bool],
    ) -> list[Group]: ...

    def discard(self, trajectories: Sequence[Trajectory]) -> None: ...


class WeightSink(Protocol):
    """Where adapters go."""

    def publish(self, data: bytes, *, version: int, checksum: str) -> None: ...
