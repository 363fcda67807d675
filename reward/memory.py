"""Memory that scoring takes above the weights, by a pass of a model without weights."""

from collections.abc import Sequence

import numpy as np

from lm.memory import metered
from lm.model import CausalLM
from reward.packed import edge_log_probs
from reward.packing import lay_out
from reward.request import ScoreItem


def scoring_bytes(model: CausalLM, items: Sequence[ScoreItem], token_budget: int) -> int:
    """Most bytes alive at a time while `items` are scored, weights not among them.

    Args:
        model: as `lm.model.build_without_weights` gives it.
    """
    largest = max(lay_out(items, token_budget).batches, key=lambda batch: batch.peak_tokens)
    with metered() as meter:
        edge_log_probs(model, largest)
    return meter.peak_bytes


def longest_items(
    *, context: int, length: int, answer: int, stops: Sequence[int], number: int, vocab_size: int
) -> list[ScoreItem]:
    """Rationales of `length` tokens that have nothing but their context in common.

    Args:
        context, answer: tokens.
        stops: prefix lengths at which they may stop.
    """
    rng = np.random.default_rng(0)
    before, after = (rng.integers(0, vocab_size, n, dtype=np.int32) for n in (context, answer))
    return [
        ScoreItem(
            context=before,
            completion=rng.integers(0, vocab_size, length, dtype=np.int32),
            stops=np.array(stops, dtype=np.int32),
            answer=after,
        )
        for _ in range(number)
    ]
