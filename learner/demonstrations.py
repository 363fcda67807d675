"""Where supervised fine-tuning has its completions from: the task's demonstrations alone."""

from collections.abc import Sequence

import numpy as np

from buffer.replay import DrawRequest, Group
from buffer.trajectory import Trajectory


class NoDemonstrations(ValueError):
    """There is nothing to imitate."""


class DemonstrationDraws:
    """A `Replay` that needs no actor: every draw is `rows` demonstrations.

    They come in shuffled rounds over all of them, each draw with rounds of its own. Rewards are not
    looked at. Raises NoDemonstrations where there are none.
    """

    def __init__(self, demonstrations: Sequence[Trajectory], *, rows: int) -> None:
        if not demonstrations:
            raise NoDemonstrations(
                'learner.objective = "sft" imitates the demonstrations of the task, and this task '
                "has none: give it some, or choose another objective"
            )
        self._demonstrations = list(demonstrations)
        self._rows = rows

    def draw(self, request: DrawRequest) -> list[Group]:
        """A group for each demonstration drawn; never waits."""
        number = len(self._demonstrations)
        rounds = [request.rng.permutation(number) for _ in range(-(-self._rows // number))]
        chosen = [self._demonstrations[at] for at in np.concatenate(rounds)[: self._rows]]
        return [Group(prompt_key=t.prompt_key, fresh=(t,), replayed=()) for t in chosen]

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Nothing disagrees with a demonstration: no policy sampled it."""
