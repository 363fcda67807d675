"""Reference definition of the log-rewards: one ordinary pass per stop state, nothing shared.

Slow on purpose. Tests hold `reward.packed` to it and `bench/scoring.py` measures against it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lm.model import CausalLM
from reward.request import ScoreItem


@torch.no_grad()
def naive_log_rewards(model: CausalLM, items: Sequence[ScoreItem]) -> list[NDArray[np.float32]]:
    """log p(z_1:t Y | context) in nats, [S] for each item, by S separate passes per item."""
    return [
        np.array([_log_joint(model, item, int(stop)) for stop in item.stops], dtype=np.float32)
        for item in items
    ]


def _log_joint(model: CausalLM, item: ScoreItem, stop: int) -> float:
    text = np.concatenate([item.context, item.completion[:stop], item.answer]).astype(np.int64)
    ids_1N = torch.from_numpy(text)[None].to(model.device)
    log_p_NV = model(input_ids=ids_1N).logits[0, :-1].float().log_softmax(dim=-1)
    log_p_N = log_p_NV.gather(1, ids_1N[0, 1:, None])[:, 0]
    return float(log_p_N[len(item.context) - 1 :].double().sum())
