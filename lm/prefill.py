"""Prompts run through the model once, and kept for the next requests for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from lm.cache import whole_cache

WORTH_A_PASS = 16  # tokens


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """U prompts after one pass. Columns right of a prompt's own tokens hold padding's states."""

    states: list[Tensor]  # of each layer the keys, then the values: [U, H, P, D]
    logits_UV: Tensor  # after each prompt's last token

    @property
    def width(self) -> int:
        """P."""
        return self.states[0].shape[2]

    def cache(self, number: int, *, copies: int) -> DynamicCache:
        """What texts go on from that begin with prompt `number`, the longest of its pass."""
        cache, copied = whole_cache(), [number] * copies
        of_layers = zip(self.states[::2], self.states[1::2], strict=True)
        for layer, (keys, values) in enumerate(of_layers):  # `update` copies: never all at once
            cache.update(keys[copied], values[copied], layer)
        return cache

    @staticmethod
    def run(model: nn.Module, prompts: Sequence[tuple[int, ...]]) -> "Prefill":
        """A pass over distinct prompts, right-padded; causal attention needs no mask for it.

        What they all begin with, such as worked examples, is read once, if it is long enough to
        be worth a pass of its own.
        """
        width = max(len(prompt) for prompt in prompts)
        device = next(model.parameters()).device
        ids_UP = torch.tensor([(*p, *[0] * (width - len(p))) for p in prompts], device=device)
        last_U = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        cache = whole_cache()
        shared = shared_length(prompts)
        if shared:
            model(
                input_ids=ids_UP[:1, :shared],
                past_key_values=cache,
                logits_to_keep=1,
                use_cache=True,
            )
            cache.batch_repeat_interleave(len(prompts))
        kept_K, column_U = (last_U - shared).unique(return_inverse=True)
        logits_UKV = model(
            input_ids=ids_UP[:, shared:],
            attention_mask=torch.ones_like(ids_UP),
            past_key_values=cache,
            logits_to_keep=kept_K,
            use_cache=True,
        ).logits
        return Prefill(
            states=[states for layer in cache.layers for states in (layer.keys, layer.values)],
            logits_UV=logits_UKV[torch.arange(len(prompts), device=device), column_U],
        )


def shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, each with one of its own behind; 0: too few to matter."""
    first, last = min(prompts), max(prompts)  # where these two agree, so do all between them
    most = min(map(len, prompts)) - 1
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    return shared if len(prompts) > 1 and shared >= WORTH_A_PASS else 0


def kept_prompts(max_rows: int) -> int:
    """Prompts that are kept, at most, beside so many rows."""
    return max(min(max_rows, 8), max_rows // 8)


class PromptStore:
    """Prefills of the prompts that were asked last, for as long as the weights stay the same."""

    def __init__(self, model: nn.Module, *, max_prompts: int) -> None:
        self._model = model
        self.max_prompts = max_prompts
        self._kept: dict[tuple[int, ...], tuple[Prefill, int]] = {}  # oldest pass first

    def __contains__(self, prompt: tuple[int, ...]) -> bool:
        return prompt in self._kept

    def take(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[Prefill, int]]:
        """Of each its prefill and its row in it; runs the model for prompts that are not kept.

        Of `prompts` at most `max_prompts` differ.
        """
        found = {prompt: self._kept[prompt] for prompt in prompts if prompt in self._kept}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        # A pass goes as a whole, for its prompts share their memory.
        while self._kept and len(self._kept) + len(new) > self.max_prompts:
            oldest = next(prefill for prefill, _ in self._kept.values())
            self._kept = {p: at for p, at in self._kept.items() if at[0] is not oldest}
        if new:
            prefill = Prefill.run(self._model, new)
            read = {prompt: (prefill, row) for row, prompt in enumerate(new)}
            found, self._kept = found | read, self._kept | read
        return [found[prompt] for prompt in prompts]

    def clear(self) -> None:
        """Forget all: the weights have changed."""
        self._kept.clear()
