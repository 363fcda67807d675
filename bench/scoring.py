"""CPU seconds of the log-rewards of every prefix, against three alternatives, on one thread.

*one pass*: every rationale is one packed row, however wide. *cached*, the strongest simple way: X Z
is read once, and behind its keys and values the copies of Y are the rows of one batch. *naive*: an
ordinary pass over every text X z_1:t Y, timed once. All score the same items on the same random
weights, with a stop state after every token. `group` rationales share each context of `context`
tokens, which cached and naive read once for every rationale; all contexts begin with `head` tokens.
Rounds of the others alternate;
figures are medians per rationale. `ratio` is ours to the better of one pass and cached,
`naive_ratio` to naive, above 1 where ours is faster; `difference` is the largest between any two
scores, in nats.

    python bench/scoring.py [--json] [--repeats N]
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from bench.command import run_cases
from lm.model import CausalLM
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem
from tests.naive_rewards import naive_log_rewards

TOKEN_BUDGET = 2048

SHAPES: dict[str, PretrainedConfig] = {
    "llama 2.6M": LlamaConfig(
        vocab_size=1000,
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=512,
    ),
    "gpt2 2.5M": GPT2Config(
        vocab_size=1000,
        n_embd=192,
        n_layer=5,
        n_head=4,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt2 124M": GPT2Config(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`contexts` times `group` rationales of `length` tokens."""

    shape: str
    context: int = 60
    length: int
    answer: int = 6
    contexts: int = 4
    group: int = 1
    head: int = 0  # of `context`


CASES = (
    *(
        Case(shape="llama 2.6M", length=length, answer=answer, contexts=contexts)
        for length, contexts in ((20, 4), (50, 4), (100, 2), (200, 1))
        for answer in (6, 20)
    ),
    Case(shape="llama 2.6M", length=20, contexts=1, group=8),
    Case(shape="llama 2.6M", context=170, head=140, length=20, group=6),
    Case(shape="gpt2 2.5M", length=20),
    Case(shape="gpt2 2.5M", length=40),
    Case(shape="gpt2 2.5M", length=20, contexts=1, group=8),
    Case(shape="gpt2 124M", length=20, contexts=1),
)


def random_model(shape: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SHAPES[shape]).eval()


def random_items(case: Case) -> list[ScoreItem]:
    rng = np.random.default_rng(0)

    def draw(size: int) -> np.ndarray:
        return rng.integers(0, 1000, size, dtype=np.int32)

    items = []
    head = draw(case.head)
    for _ in range(case.contexts):
        context, answer = np.append(head, draw(case.context - case.head)), draw(case.answer)
        for _ in range(case.group):
            items.append(
                ScoreItem(
                    context=context,
                    completion=draw(case.length),
                    stops=np.arange(case.length + 1, dtype=np.int32),
                    answer=answer,
                    shared=case.head,
                )
            )
    return items


def one_pass_log_rewards(model: CausalLM, items: list[ScoreItem]) -> list[NDArray[np.float32]]:
    """log p(z_1:t Y | context) in nats, [S] for each item, by rows that are never parted."""
    with patch("reward.packing.ONE_PASS_WIDTH", 1 << 30):
        return suffix_log_rewards(model, items, 1 << 30)


@torch.no_grad()
def cached_log_rewards(model: CausalLM, items: list[ScoreItem]) -> list[NDArray[np.float32]]:
    """log p(z_1:t Y | context) in nats, [S] for each item, by two passes per item."""
    return [_cached(model, item) for item in items]


def _cached(model: CausalLM, item: ScoreItem) -> NDArray[np.float32]:
    trunk_N = torch.from_numpy(np.concatenate([item.context, item.completion]).astype(np.int64))
    answer_Y = torch.from_numpy(item.answer.astype(np.int64))
    read_S = torch.from_numpy(item.stops.astype(np.int64)) + len(item.context)
    trunk = model(input_ids=trunk_N[None], use_cache=True)
    log_next_NV = trunk.logits[0].log_softmax(-1)

    log_z_T = log_next_NV[:-1].gather(1, trunk_N[1:, None])[len(item.context) - 1 :, 0].double()
    log_z_S = torch.cat([torch.zeros(1, dtype=torch.float64), log_z_T.cumsum(0)])[item.stops]
    first_S = log_next_NV[read_S - 1, answer_Y[0]].double()

    cache = trunk.past_key_values
    for layer in cache.layers:  # as views: every row reads the same keys and values
        layer.keys = layer.keys.expand(len(read_S), -1, -1, -1)
        layer.values = layer.values.expand(len(read_S), -1, -1, -1)
    sees_SN = torch.arange(len(trunk_N)) < read_S[:, None]
    sees_SK = torch.cat([sees_SN, torch.ones(len(read_S), len(answer_Y), dtype=torch.bool)], dim=1)
    answer_SY = answer_Y.expand(len(read_S), -1)
    log_next_SYV = model(
        input_ids=answer_SY,
        position_ids=read_S[:, None] + torch.arange(len(answer_Y)),
        attention_mask=sees_SK.long(),
        past_key_values=cache,
        use_cache=True,
    ).logits.log_softmax(-1)
    rest_SY = log_next_SYV[:, :-1].gather(2, answer_SY[:, 1:, None])[..., 0].double()
    return (log_z_S + first_S + rest_SY.sum(1)).float().numpy()


def cpu_seconds(work: Callable[[], Any]) -> float:
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


def measure(case: Case, repeats: int) -> dict[str, object]:
    model, items = random_model(case.shape), random_items(case)

    sides: dict[str, Callable[[], list[NDArray[np.float32]]]] = {
        "ours": lambda: suffix_log_rewards(model, items, TOKEN_BUDGET),
        "one_pass": lambda: one_pass_log_rewards(model, items),
        "cached": lambda: cached_log_rewards(model, items),
        "naive": lambda: naive_log_rewards(model, items),
    }
    scores: list[NDArray[np.float32]] = []

    def keep(side: Callable[[], list[NDArray[np.float32]]]) -> None:
        scores.append(np.concatenate(side()))

    first_s = {name: cpu_seconds(partial(keep, side)) for name, side in sides.items()}
    timed = [side for name, side in sides.items() if name != "naive"]
    rounds = [[cpu_seconds(side) for side in timed] for _ in range(repeats)]
    ours_s, one_pass_s, cached_s = (statistics.median(t) for t in zip(*rounds, strict=True))
    return {
        "model": case.shape,
        "context": case.context,
        "length": case.length,
        "answer": case.answer,
        "contexts": case.contexts,
        "group": case.group,
        "head": case.head,
        "ours_ms": round(1e3 * ours_s / len(items), 2),
        "one_pass_ms": round(1e3 * one_pass_s / len(items), 2),
        "cached_ms": round(1e3 * cached_s / len(items), 2),
        "naive_ms": round(1e3 * first_s["naive"] / len(items), 2),
        "ratio": round(min(one_pass_s, cached_s) / ours_s, 2),
        "naive_ratio": round(first_s["naive"] / ours_s, 2),
        "difference": float(np.ptp(scores, axis=0).max()),
    }


if __name__ == "__main__":
    run_cases(__doc__, measure, CASES)
