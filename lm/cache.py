"""A key-value cache of slots: one slot per row, and in it one column per position.

Rows share nothing: there is no left padding, and a row that ends frees its slot. Columns beyond a
row's own position hold leftovers, which the caller's attention mask hides. Live rows always fill
the first slots, so that a view selects them. It grows as rows do, and never shrinks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from lm.attention import attention_mask

BLOCK = 64  # columns that there are at first, where rows may grow longer


class SlotCache(Cache):
    """Keys and values per layer, [R slots, H heads, C columns, D], written in place.

    Before each decoding pass `place` says which position every live row is at.

    Args:
        slots: at first; more are made where `write` needs them.
        columns: likewise, where `place` or `write` does.
        limit: columns of the longest row that is expected: no more are made beforehand.
    """

    def __init__(self, *, slots: int, columns: int, limit: int = 0) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.columns = columns
        self.limit = limit
        self._buffers: list[Tensor] = []  # of each layer the keys, then the values
        self._live = 0
        self._width = 0
        self._flat_index = torch.empty(0, dtype=torch.long)

    def place(self, position_N: Tensor, width: int) -> None:
        """The next pass appends one token to rows 0..N-1, at these positions, all < width."""
        if width > self.columns:
            self._grow(self.slots, width)
        heads = self._buffers[0].shape[1]
        row_NH = torch.arange(len(position_N) * heads, device=position_N.device).view(-1, heads)
        self._flat_index = (row_NH * self.columns + position_N[:, None]).flatten()
        self._live, self._width = len(position_N), width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by each attention layer, [N, H, 1, D] -> [N, H, width, D]."""
        keys, values = self._buffers[2 * layer_idx], self._buffers[2 * layer_idx + 1]
        for states, buffer in ((key_states, keys), (value_states, values)):
            flat = buffer.view(-1, buffer.shape[-1])
            flat.index_copy_(0, self._flat_index, states.reshape(-1, states.shape[-1]))
        return keys[: self._live, :, : self._width], values[: self._live, :, : self._width]

    def write(self, slots: Tensor, states: list[Tensor], sources: Tensor) -> None:
        """Fill `slots`, ascending, from column 0 with rows `sources` of `Prefill.states`."""
        columns = states[0].shape[2]
        if not self._buffers:
            # Zeros, since a masked NaN leftover would still poison the weighted sum of values.
            self._buffers = [
                like.new_zeros(self.slots, like.shape[1], self.columns, like.shape[3])
                for like in states
            ]
        self._grow(int(slots[-1]) + 1, columns)
        for buffer, of_layer in zip(self._buffers, states, strict=True):
            buffer[:, :, :columns].index_copy_(0, slots, of_layer.index_select(0, sources))

    def read(self, slot: int, columns: int) -> list[Tensor]:
        """What a slot holds in its first columns, as `Prefill.states` of one row."""
        return [buffer[slot : slot + 1, :, :columns].clone() for buffer in self._buffers]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole slots; `sources` and `targets` are disjoint."""
        for buffer in self._buffers:
            buffer.index_copy_(0, targets, buffer.index_select(0, sources))

    def reorder(self, sources: Tensor) -> None:
        """Slots 0..N-1 become copies of slots `sources` [N], of which some may occur repeatedly."""
        for buffer in self._buffers:
            buffer[: len(sources)] = buffer.index_select(0, sources)

    def _grow(self, slots: int, columns: int) -> None:
        """To so many at least; half as much again, so that copying stays a small part."""
        if slots <= self.slots and columns <= self.columns:
            return
        if columns > self.columns:
            spare = self.columns + self.columns // 2
            columns = max(columns, min(spare, self.limit) if columns <= self.limit else spare)
        slots, columns = max(slots, self.slots), max(columns, self.columns)
        padding = (0, 0, 0, columns - self.columns, 0, 0, 0, slots - self.slots)
        for place, buffer in enumerate(self._buffers):  # one by one: not all of them twice
            self._buffers[place] = nn.functional.pad(buffer, padding)
        self.slots, self.columns = slots, columns


def whole_cache() -> DynamicCache:
    """An empty cache of every position; one that a model makes keeps no more than its windows."""
    return DynamicCache()


def decode_step(
    model: nn.Module, cache: SlotCache, tokens: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Feed rows 0..N-1 of the cache a token each, at these positions; [N, V] logits after them."""
    device = next(model.parameters()).device
    width = max(positions) + 1
    position_N = torch.tensor(positions, device=device)
    cache.place(position_N, width)
    column_1W = torch.arange(width, device=device)[None]
    logits_NV: Tensor = model(
        input_ids=torch.tensor(tokens, device=device)[:, None],
        position_ids=position_N[:, None],
        attention_mask=attention_mask(
            model, (column_1W <= position_N[:, None])[:, None], position_N[:, None], column_1W
        ),
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    return logits_NV
