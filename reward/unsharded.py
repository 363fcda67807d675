"""The frozen LM held whole by one process: rank 0 of a replica that has no other ranks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lm.model import CausalLM
from reward.packed import edge_log_probs, score_limits
from reward.packing import MicroBatch
from reward.request import ScoreLimits


class WholeRank:
    """Does what a RewardRank does, without process group, gathers or DeepSpeed."""

    def __init__(self, model: CausalLM) -> None:
        self.limits: ScoreLimits = score_limits(model)
        self._model = model.eval().requires_grad_(False)

    def forward(self, share: Sequence[MicroBatch]) -> list[NDArray[np.float32]]:
        """Log-probabilities of all edges of each micro-batch."""
        return [edge_log_probs(self._model, batch) for batch in share]

    def close(self) -> None:
        """Nothing to leave."""
