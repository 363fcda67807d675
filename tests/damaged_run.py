"""`amortize`, except that actor-1's copy of the base LM is damaged once it is loaded.

For `python -m tests.damaged_run train ...`: the product has no switch for this.
"""

import sys

import torch

from cluster import __main__, launch
from cluster.workers import Meeting, RolloutWorker

DAMAGED = "actor-1"


class DamagedWorker(RolloutWorker):
    """A rollout actor; the one called DAMAGED is not what it believes to be."""

    def start(self, meeting: Meeting) -> None:
        super().start(meeting)
        if self._name == DAMAGED:
            embedding = self._actor._policy._model.get_input_embeddings().weight  # type: ignore[attr-defined]
            with torch.no_grad():
                embedding[:, 0] += 1.0


if __name__ == "__main__":
    # The launcher makes Ray actors of what bears this name.
    launch.RolloutWorker = DamagedWorker  # type: ignore[misc]
    sys.exit(__main__.main())
