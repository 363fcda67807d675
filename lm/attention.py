"""Attention of passes in which a row holds several texts, or columns of other rows: its masks, and
transformers' "sdpa" where a mask meets heads that share keys and values.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lm.model import model_config

# What the layers of a model attend over, as transformers calls it.
_SLIDING, _CHUNKED = "sliding_attention", "chunked_attention"


def attention_mask(
    model: nn.Module, sees_RQK: Tensor, position_RQ: Tensor, position_RK: Tensor
) -> Tensor | dict[str, Tensor]:
    """`sees_RQK` as the model takes it: added to attention scores, one mask for each kind of layer.

    Where layers attend over a window of positions only, columns beyond it are hidden there.

    Args:
        sees_RQK: whether a column of the pass sees another, by what texts they belong to.
        position_RQ: of the columns of the pass in their texts.
        position_RK: of the columns that may be seen: the cache's and the pass's.
    """
    config: Any = model_config(model)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {
            kind: _additive(model, _within(config, kind, sees_RQK, position_RQ, position_RK))
            for kind in sorted(kinds)
        }
    kind = next(iter(kinds), _SLIDING)  # a window that no layer is named for is every layer's
    return _additive(model, _within(config, kind, sees_RQK, position_RQ, position_RK))


def _within(
    config: Any, kind: str, sees_RQK: Tensor, position_RQ: Tensor, position_RK: Tensor
) -> Tensor:
    window = getattr(config, "sliding_window", None)
    if kind == _SLIDING and window is not None:
        return sees_RQK & (position_RQ[:, :, None] - position_RK[:, None] < window)
    chunk = getattr(config, "attention_chunk_size", None)
    if kind == _CHUNKED and chunk is not None:
        return sees_RQK & (position_RQ[:, :, None] // chunk == position_RK[:, None] // chunk)
    return sees_RQK


def _additive(model: nn.Module, sees_RQK: Tensor) -> Tensor:
    """[R, 1, Q, K] 0 where a column is seen, else the lowest number of the model's dtype."""
    dtype = next(model.parameters()).dtype
    mask_RQK = torch.zeros(sees_RQK.shape, dtype=dtype, device=sees_RQK.device)
    return mask_RQK.masked_fill_(~sees_RQK, torch.finfo(dtype).min)[:, None]


def _grouped_attention(
    module: nn.Module,
    query_RHQD: Tensor,
    key_RGKD: Tensor,
    value_RGKD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' own, which copies keys and values for each of the H / G heads that share them
    where there is a mask, a third of a decoding pass on a CPU (5.19; 5.23 copies nothing for one
    query). The kernel needs no copies, and computes the same bit for bit; with gradients it is the
    slower one.
    """
    shared = key_RGKD.shape[1] < query_RHQD.shape[1]
    copied = query_RHQD.device.type != "cpu" or query_RHQD.requires_grad
    more = any(rest.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if copied or more or not shared or attention_mask is None:
        return sdpa_attention_forward(
            module,
            query_RHQD,
            key_RGKD,
            value_RGKD,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **rest,
        )
    out_RHQD = scaled_dot_product_attention(
        query_RHQD,
        key_RGKD,
        value_RGKD,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
    )
    return out_RHQD.transpose(1, 2).contiguous(), None


AttentionInterface.register("sdpa", _grouped_attention)
