"""A prompt's states and logits are those of a pass of its own, whoever passes beside it."""

import pytest
import torch
from torch import nn

from lm.cache import whole_cache
from lm.prefill import Prefill, shared_length
from tests.families import FAMILIES, VOCAB_SIZE, tiny_model

LEAD = tuple(3 + place * 7 % (VOCAB_SIZE - 3) for place in range(20))  # longer than the windows


@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_begin_with_is_read_once_and_changes_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    prompts = [(*LEAD, 5, 6, 7), (*LEAD, 9), (*LEAD, 5, 8, 30, 31, 32)]
    expected = [alone(model, prompt) for prompt in prompts]
    tokens: list[int] = []
    forward = model.forward

    def counting(*args: torch.Tensor, **words: torch.Tensor) -> object:
        tokens.append(words["input_ids"].numel())
        return forward(*args, **words)

    monkeypatch.setattr(model, "forward", counting)
    with torch.no_grad():
        prefill = Prefill.run(model, prompts)
    assert tokens == [len(LEAD), len(prompts) * 5]
    for row, (states, logits_V) in enumerate(expected):
        torch.testing.assert_close(prefill.logits_UV[row], logits_V, atol=2e-5, rtol=1e-4)
        for own, found in zip(states, prefill.states, strict=True):
            kept = found[row, :, : own.shape[2]]
            torch.testing.assert_close(kept, own[0], atol=2e-5, rtol=1e-4)


def alone(model: nn.Module, prompt: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Keys and values of each layer, [1, H, P, D], and the [V] logits after the last token."""
    cache = whole_cache()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
    states = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    return states, out.logits[0, -1]


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([LEAD], 0),  # nobody to share it with
        ([(*LEAD, 5), (*LEAD, 6)], 20),
        ([LEAD, (*LEAD, 6)], 19),  # the last token of each is its own: its logits are wanted
        ([(*LEAD[:8], 5), (*LEAD[:8], 6)], 0),  # not worth a pass
        ([(4, *LEAD), (5, *LEAD)], 0),
    ],
)
def test_so_much_of_the_prompts_is_shared(prompts: list[tuple[int, ...]], shared: int) -> None:
    assert shared_length(prompts) == shared
