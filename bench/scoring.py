"""CPU seconds of the packed log-rewards against S ordinary passes per rationale, on one thread.

Both score the same items on the same random weights: |Y| = 6, a stop state after every token.
`group` rationales share each context of `context` tokens; naive has nothing to share. Rounds of
the two alternate; figures are medians per rationale. `ratio` is naive / packed, and `difference`
the largest between their scores, in nats.

    python bench/scoring.py [--json] [--repeats N]
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from bench.command import run_cases
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem
from tests.naive_rewards import naive_log_rewards

ANSWER = 6
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
    contexts: int = 4
    group: int = 1


CASES = (
    Case(shape="llama 2.6M", length=20),
    Case(shape="llama 2.6M", length=40),
    Case(shape="llama 2.6M", length=20, contexts=1, group=8),
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
    for _ in range(case.contexts):
        context, answer = draw(case.context), draw(ANSWER)
        for _ in range(case.group):
            items.append(
                ScoreItem(
                    context=context,
                    completion=draw(case.length),
                    stops=np.arange(case.length + 1, dtype=np.int32),
                    answer=answer,
                )
            )
    return items


def cpu_seconds(work: Callable[[], Any]) -> float:
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


def measure(case: Case, repeats: int) -> dict[str, object]:
    model, items = random_model(case.shape), random_items(case)

    def packed() -> list[np.ndarray]:
        return suffix_log_rewards(model, items, TOKEN_BUDGET)

    def naive() -> list[np.ndarray]:
        return naive_log_rewards(model, items)

    pairs = zip(packed(), naive(), strict=True)  # also the warm-up
    difference = max(float(np.abs(one - other).max()) for one, other in pairs)
    rounds = [(cpu_seconds(packed), cpu_seconds(naive)) for _ in range(repeats)]
    packed_s, naive_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {
        "model": case.shape,
        "context": case.context,
        "length": case.length,
        "answer": ANSWER,
        "contexts": case.contexts,
        "group": case.group,
        "packed_ms": round(1e3 * packed_s / len(items), 2),
        "naive_ms": round(1e3 * naive_s / len(items), 2),
        "ratio": round(naive_s / packed_s, 2),
        "difference": difference,
    }


if __name__ == "__main__":
    run_cases(__doc__, measure, CASES)
