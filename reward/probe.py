"""Holds the passes that this system makes through a base LM against one plain pass per text.

Not every architecture heeds masks with several texts in a row, positions that start anew within it,
and caches filled by hand: some would be trained on wrong probabilities, in silence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lm.actions import ActionSpace
from lm.cache import SlotCache, decode_step
from lm.config import LMConfig
from lm.hub import ModelUnusable
from lm.model import (
    CausalLM,
    LanguageModel,
    context_limit,
    model_config,
    text_prefix_of,
    vocab_size,
)
from lm.prefill import Prefill
from lm.scoring import completion_log_probs
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem

# Nats a token, in the mean over a text. Rounding makes some 1e-5 in float32 and up to 0.1 in
# bfloat16; what is attended wrongly makes 0.1 to 10.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.3}
COMPLETION, ANSWER, SHORT, BEYOND = 12, 4, 5, 16  # tokens
_TOKEN_BUDGET = 2048

Tokens = tuple[int, ...]


class _Text(NamedTuple):
    prompt: Tokens
    completion: Tokens


def check_base(config: LMConfig, base: LanguageModel) -> None:
    """Probe `base` unless `lm.probe` is false."""
    if config.probe:
        probe(base.model, config.model)


@torch.inference_mode()
def probe(model: CausalLM, name: str) -> None:
    """Raise ModelUnusable, which names pass and nats, unless all agree with plain passes.

    On prompts shorter and longer than any window that the layers have.
    """
    texts = _random_texts(model)
    try:
        plain_N = np.array([_plain(model, text) for text in texts])
    except Exception as error:  # whatever an unforeseen architecture makes of it
        raise ModelUnusable(
            f"model {name!r}, a {type(model).__name__}, cannot read a text on {model.device}: "
            f"{error!r}; take a base of another architecture (docs/models.md)"
        ) from error
    passes = {
        "learner's packed pass": _learned,
        "packed scoring pass": _scored,
        "sampler's cached decoding": _decoded,
    }
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    for what, compute in passes.items():
        try:
            nats_N = np.abs(compute(model, texts) - plain_N)
        except Exception as error:  # whatever an unforeseen architecture makes of these passes
            raise _unusable(model, name, f"the {what} fails: {error!r}") from error
        worst_N = nats_N / [len(text.completion) for text in texts]
        if not (worst_N <= tolerance).all():
            text = texts[int(np.nan_to_num(worst_N, nan=np.inf).argmax())]
            size = len(text.prompt) + len(text.completion)
            raise _unusable(
                model,
                name,
                f"the {what} is {worst_N.max():.2g} nats a token off a plain pass over the same "
                f"text of {size} tokens (at most {tolerance})",
            )


def _unusable(model: CausalLM, name: str, what: str) -> ModelUnusable:
    return ModelUnusable(
        f"model {name!r}, a {type(model).__name__}, computes other probabilities where texts share "
        f"a pass: {what}; take a base of another architecture (docs/models.md), or set lm.probe = "
        "false to train on what it computes"
    )


def longest_window(model: CausalLM) -> int:
    """Tokens of the widest window, chunk or convolution that layers of `model` look through."""
    config: Any = model_config(model)
    looked_through = (
        value
        for key, value in config.to_dict().items()
        if any(word in key.lower() for word in ("window", "chunk", "conv")) and type(value) is int
    )
    return max(looked_through, default=0)


def _random_texts(model: CausalLM) -> list[_Text]:
    """Three completions each of a short prompt and of one beyond every window, as far as the model
    has positions: z_1:t Y, z Y and w Y, of tokens other than 0."""
    rng = np.random.default_rng(0)
    room = context_limit(model) - COMPLETION - ANSWER
    lengths = {max(2, min(length, room)) for length in (SHORT, longest_window(model) + BEYOND)}

    def draw(count: int) -> Tokens:
        return tuple(rng.integers(1, vocab_size(model), count).tolist())

    texts = []
    for length in sorted(lengths):
        prompt, z, w, y = (draw(count) for count in (length, COMPLETION, COMPLETION, ANSWER))
        texts += [_Text(prompt, (*begun, *y)) for begun in (z[: COMPLETION // 2], z, w)]
    return texts


def _plain(model: CausalLM, text: _Text) -> float:
    """log p of the completion by one pass over the text alone: no cache, mask or position."""
    ids_1N = torch.tensor([[*text_prefix_of(model), *text.prompt, *text.completion]])
    ids_1N = ids_1N.to(model.device)
    kept = len(text.completion) + 1
    logits_KV = model(input_ids=ids_1N, use_cache=False, logits_to_keep=kept).logits[0, -kept:]
    token_T1 = torch.tensor(text.completion, device=model.device)[:, None]
    return float(logits_KV[:-1].float().log_softmax(dim=-1).gather(1, token_T1).double().sum())


def _learned(model: CausalLM, texts: Sequence[_Text]) -> NDArray[np.float64]:
    """[N] log p of each completion; token 0 spells a ⊤ that is open everywhere."""
    actions = ActionSpace(
        stop_token=0, legal_tokens=None, min_len=0, max_len=COMPLETION + ANSWER + 1
    )
    found = completion_log_probs(
        model,
        actions,
        [text.prompt for text in texts],
        [text.completion for text in texts],
        [[False] * len(text.completion) for text in texts],
    )
    return found.log_pf_BT.double().sum(dim=1).cpu().numpy()


def _scored(model: CausalLM, texts: Sequence[_Text]) -> NDArray[np.float64]:
    """[N] log p of each completion as z_1:t Y, of which z has two stop states."""
    items = []
    for _, z, w in (texts[at : at + 3] for at in range(0, len(texts), 3)):
        for text, stops in ((z, [COMPLETION // 2, COMPLETION]), (w, [COMPLETION])):
            rationale, answer = text.completion[:COMPLETION], text.completion[COMPLETION:]
            items.append(ScoreItem.of(text.prompt, rationale, stops=stops, answer=answer))
    return np.concatenate(suffix_log_rewards(model, items, _TOKEN_BUDGET)).astype(np.float64)


def _decoded(model: CausalLM, texts: Sequence[_Text]) -> NDArray[np.float64]:
    """[N] log p of each completion, a token at a time through the sampler's cache."""
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n].completion))
    prefix = text_prefix_of(model)
    # Those that end first are last.
    rows = [texts[n]._replace(prompt=(*prefix, *texts[n].prompt)) for n in order]
    prompts = list(dict.fromkeys(text.prompt for text in rows))
    source_N = torch.tensor([prompts.index(text.prompt) for text in rows], device=model.device)
    prefill = Prefill.run(model, prompts)
    longest = max(map(len, prompts)) + COMPLETION + ANSWER
    cache = SlotCache(slots=len(rows), columns=longest)
    cache.write(torch.arange(len(rows)).to(source_N), prefill.states, source_N)
    logits_NV = prefill.logits_UV[source_N]
    log_p_N = np.zeros(len(texts))
    for place in range(COMPLETION + ANSWER):
        live = [text for text in rows if len(text.completion) > place]
        tokens = [text.completion[place] for text in live]
        log_p_NV = logits_NV[: len(live)].float().log_softmax(dim=-1)
        chosen_N1 = torch.tensor(tokens, device=model.device)[:, None]
        log_p_N[order[: len(live)]] += log_p_NV.gather(1, chosen_N1)[:, 0].double().cpu().numpy()
        positions = [len(text.prompt) + place for text in live]
        logits_NV = decode_step(model, cache, tokens, positions)
    return log_p_N
