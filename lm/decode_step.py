"""One more token behind every row of a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm.cache import SlotCache


def extend(
    model: nn.Module, cache: SlotCache, tokens: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Feed rows 0..N-1 of the cache a token each, at these positions; [N, V] logits behind them."""
    weight = next(model.parameters())
    width = max(positions) + 1
    position_N = torch.tensor(positions, device=weight.device)
    cache.place(position_N, width)
    hidden_NW = torch.arange(width, device=weight.device) > position_N[:, None]
    mask_NW = torch.zeros(hidden_NW.shape, dtype=weight.dtype, device=weight.device)
    mask_NW = mask_NW.masked_fill_(hidden_NW, torch.finfo(weight.dtype).min)
    logits_NV: Tensor = model(
        input_ids=torch.tensor(tokens, device=weight.device)[:, None],
        position_ids=position_N[:, None],
        attention_mask=mask_NW[:, None, None, :],
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    return logits_NV
