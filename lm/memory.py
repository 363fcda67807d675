"""How much memory the passes of a model take, found without weights and without computing.

On torch's meta device tensors have shapes and no numbers, so that the code which learns, scores or
samples can run there on a model of any size: nothing is stored, and every tensor that it makes and
gives up again is counted by the bytes that it would have.
"""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lm.model import model_config, vocab_size

# Float32 tables of [rows, vocabulary] that a draw holds: logits, log q, weights, noise, and two.
_DRAW_TABLES = 6


def device_memory_bytes(device: torch.device) -> int:
    """All the memory of a device; of the CPU the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kv_cache_bytes(model: PreTrainedModel, *, rows: int, columns: int) -> int:
    """Bytes of the keys and values of `rows` texts of `columns` tokens, in the model's dtype."""
    config: Any = model_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * rows * columns * model.dtype.itemsize


def draw_bytes(model: PreTrainedModel, *, rows: int) -> int:
    """Bytes that a draw of the next tokens of `rows` texts holds at a time."""
    return _DRAW_TABLES * rows * vocab_size(model) * 4


@torch.no_grad()
def prefill_bytes(model: PreTrainedModel, *, tokens: int) -> int:
    """Bytes that a pass over prompts of so many tokens holds at a time; their cache not among them.

    Args:
        model: as `lm.model.build_without_weights` gives it.
    """
    with metered() as meter:
        ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
        model.base_model(input_ids=ids, use_cache=False)
    return meter.peak_bytes


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within the block, while they are alive.

    Tensors on the meta device have no numbers: where the code reads some, it finds ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten._to_copy.default and _leaves_meta(args[0], kwargs or {}):
            return torch.ones(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype)
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # viewed or written to
        if func is torch.ops.aten.logsumexp.default:  # makes a copy that nobody sees
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + args[0].nbytes)
        for storage in _storages(result):
            if storage._cdata not in given:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _fused(
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    value_BHKD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and (copies := query_BHQD.shape[1] // key_BHKD.shape[1]) > 1:
        key_BHKD = key_BHKD.repeat_interleave(copies, dim=1)
        value_BHKD = value_BHKD.repeat_interleave(copies, dim=1)
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_BHQD, key_BHKD, value_BHKD, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return attended


@contextmanager
def metered() -> Iterator[MemoryMeter]:
    """Within the block memory is counted, and attention is as a fused kernel computes it.

    Such a kernel holds no scores; for meta tensors torch takes the one that holds them all. One
    block of a process at a time.
    """
    functions: Any = torch.nn.functional
    attention = functions.scaled_dot_product_attention
    functions.scaled_dot_product_attention = _fused
    try:
        with MemoryMeter() as meter:
            yield meter
    finally:
        functions.scaled_dot_product_attention = attention


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _leaves_meta(tensor: Tensor, kwargs: Mapping[str, Any]) -> bool:
    to = kwargs.get("device")
    return tensor.is_meta and to is not None and torch.device(to).type != "meta"
