"""`amortize`, except that actor-1's copy of the base LM is damaged on the way.

For `python -m tests.damaged_run train ...`: the product has no switch for this.
"""

import sys

import torch

from actors.protocols import RolloutEngine
from actors.weight_sources import PublishedWeights, WeightSource
from cluster import __main__
from cluster.distributed import launcher as launch
from cluster.distributed.rollout_worker import RolloutWorker
from cluster.distributed.worker import Meeting

DAMAGED = "actor-1"
# By then the learner has left a checkpoint, whichever actor came first.
FIRST_DAMAGED_VERSION = 4


class Damaging:
    """The weight store; who takes weights of it that are not among the first is damaged."""

    def __init__(self, store: WeightSource, policy: RolloutEngine) -> None:
        self._weight_store = store
        self._policy = policy
        self._done = False

    def newer_than(self, version: int) -> PublishedWeights | None:
        fresh = self._weight_store.newer_than(version)
        if fresh is not None and fresh.version >= FIRST_DAMAGED_VERSION and not self._done:
            embedding = self._policy.model.get_input_embeddings().weight  # type: ignore[attr-defined]
            with torch.no_grad():
                embedding[:, 0] += 1.0
            self._done = True
        return fresh


class DamagedWorker(RolloutWorker):
    """A rollout actor; the one called DAMAGED is not what it believes to be."""

    def start(self, meeting: Meeting) -> None:
        super().start(meeting)
        if self._member.name == DAMAGED:
            self._actor.weights = Damaging(self._actor.weights, self._actor.policy)


if __name__ == "__main__":
    # The launcher makes Ray actors of what bears this name.
    launch.RolloutWorker = DamagedWorker  # type: ignore[misc]
    sys.exit(__main__.main())
