"""Sampling, packed scoring and the SubTB update on one GPU, at GPT-2 XL and GPT-J 6B shape.

Random weights in bfloat16, LoRA of rank 64 on every linear layer in the update. `share` is the
rate of useful multiply-adds in the weight matrices (attention scores, padding and optimizer not
counted), over the rate of a large bfloat16 matrix product measured in the same run. Times are
medians, synchronised. Sampling reads all weights for every token, so it is bound by memory.

    python bench/gpu.py [--json] [--repeats N]

Needs torch, transformers and peft only. Without a GPU it says so and exits 0.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from learner.objectives.base import ObjectiveInput
from learner.objectives.subtb import SubTB
from lm.actions import ActionSpace
from lm.config import LoRAConfig
from lm.model import LanguageModel, attach_adapter, freeze, vocab_size
from lm.sampling import Request, Sampler
from lm.scoring import completion_log_probs
from reward.packed import suffix_log_rewards
from reward.packing import lay_out
from reward.request import ScoreItem

SHAPES = {"GPT-2 XL": GPT2Config(n_embd=1600, n_layer=48, n_head=25), "GPT-J 6B": GPTJConfig()}
MATRIX_SIZE = 8192

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One workload: `prompts` groups of `group` completions."""

    prompts: int = 8
    group: int = 16
    prompt: int = 60  # tokens
    completion: int = 40  # tokens, of every row
    answer: int = 6
    token_budget: int = 16_384
    update_rows: int = 32
    rank: int = 64


@dataclass(frozen=True, slots=True)
class Weights:
    """Elements of the weight matrices that a token meets."""

    body: int
    head: int  # where the next token is asked for

    @staticmethod
    def of(model: PreTrainedModel) -> "Weights":
        head = model.get_output_embeddings().weight.numel()
        in_layers = re.compile(r"\.(h|layers)\.").search
        linear = [p for name, p in model.named_parameters() if p.ndim == 2 and in_layers(name)]
        return Weights(sum(p.numel() for p in linear), head)

    def flops(self, tokens: int, predictions: int) -> float:
        """Of one forward pass."""
        return 2.0 * (self.body * tokens + self.head * predictions)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of `repeats` runs after one warm-up."""
    times = []
    for _ in range(1 + repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(
    device: torch.device, size: int, repeats: int, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Multiply-adds per second, times two, of a square product."""
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / seconds(lambda: left @ right, device, repeats)


def random_model(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    freeze(model)
    return model


def measure_sampling(model: PreTrainedModel, load: Load, repeats: int) -> tuple[float, int, float]:
    """Seconds, sampled tokens and useful operations of one batch of groups."""
    size = vocab_size(model)
    actions = ActionSpace(
        stop_token=0, legal_tokens=None, min_len=load.completion, max_len=load.completion
    )
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(1, size, load.prompt).tolist()) for _ in range(load.prompts)]
    requests = [Request(prompt=prompt) for prompt in prompts for _ in range(load.group)]
    sampler = Sampler(model, actions, None, max_rows=len(requests))
    generator = torch.Generator(model.device).manual_seed(0)
    spent_s = seconds(lambda: sampler.sample(requests, generator), model.device, repeats)
    sampled = len(requests) * load.completion
    flops = Weights.of(model).flops(load.prompts * load.prompt + sampled, sampled)
    return spent_s, sampled, flops


def measure_scoring(model: PreTrainedModel, load: Load, repeats: int) -> tuple[float, int, float]:
    """Seconds, packed tokens and useful operations of scoring the same groups."""
    size, rng = vocab_size(model), np.random.default_rng(1)

    def draw(length: int) -> np.ndarray:
        return rng.integers(1, size, length, dtype=np.int32)

    stops = np.arange(load.completion + 1, dtype=np.int32)
    pairs = [(draw(load.prompt), draw(load.answer)) for _ in range(load.prompts)]
    items = [
        ScoreItem(context=context, completion=draw(load.completion), stops=stops, answer=answer)
        for context, answer in pairs
        for _ in range(load.group)
    ]
    spent_s = seconds(
        lambda: suffix_log_rewards(model, items, load.token_budget), model.device, repeats
    )
    batches = lay_out(items, load.token_budget).batches
    packed = sum(row.width for batch in batches for row in batch.rows)
    heads = load.prompts * (load.prompt - 1)
    return spent_s, packed + heads, Weights.of(model).flops(packed + heads, packed)


def measure_update(
    base: PreTrainedModel, policy: PeftModel, weights: Weights, load: Load, repeats: int
) -> tuple[float, int, float]:
    """Seconds, tokens and useful operations of one SubTB step: forward, backward, AdamW."""
    size, rng, rows = vocab_size(base), np.random.default_rng(2), load.update_rows
    actions = ActionSpace(stop_token=0, legal_tokens=None, min_len=0, max_len=load.completion)
    prompts = rng.integers(1, size, (rows, load.prompt)).tolist()
    completions = rng.integers(1, size, (rows, load.completion)).tolist()
    marks = [[False] * load.completion] * rows
    states = load.completion + 1
    log_reward_BS = torch.from_numpy(rng.normal(-50, 5, (rows, states)).astype(np.float32))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    objective = SubTB()
    stop_BS = torch.ones(rows, states, dtype=torch.bool, device=base.device)

    def step() -> None:
        log_probs = completion_log_probs(policy, actions, prompts, completions, marks)
        batch = ObjectiveInput(
            log_pf_BT=log_probs.log_pf_BT,
            log_stop_BS=log_probs.log_stop_BS,
            log_reward_BS=log_reward_BS.to(base.device),
            stop_BS=stop_BS,
            group_B=torch.arange(rows, device=base.device) // load.group,
        )
        loss = objective(batch).total / objective.weight(stop_BS).float()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    spent_s = seconds(step, base.device, repeats)
    tokens = rows * (load.prompt + load.completion)
    adapter = sum(parameter.numel() for parameter in trained)
    # The frozen base passes gradients back to its inputs only, the adapter to its weights too.
    flops = 2 * weights.flops(tokens, rows * states) + 6.0 * adapter * tokens
    return spent_s, tokens, flops


def measure(
    shape: str,
    config: PretrainedConfig,
    load: Load,
    device: torch.device,
    rate: float,
    repeats: int,
) -> Iterator[Row]:
    """One row for each kind of work on one model."""
    model = random_model(config, device)
    weights = Weights.of(model)
    size = round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2)
    measured = {
        "sampling": measure_sampling(model, load, repeats),
        "packed scoring": measure_scoring(model, load, repeats),
    }
    language_model = LanguageModel(
        model=model, tokenizer=PreTrainedTokenizerFast, fingerprint="random"
    )
    adapter = LoRAConfig(rank=load.rank, alpha=float(load.rank))
    policy = attach_adapter(language_model, adapter, seed=0)
    measured["SubTB update"] = measure_update(model, policy, weights, load, repeats)
    for work, (spent_s, tokens, flops) in measured.items():
        yield {
            "model": shape,
            "parameters_1e9": size,
            "work": work,
            "ms": round(1e3 * spent_s, 1),
            "tokens_per_s": round(tokens / spent_s),
            "tflops": round(flops / spent_s / 1e12, 2),
            "share": round(flops / spent_s / rate, 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each work")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        note = "no GPU here: nothing measured"
        print(json.dumps({"rows": [], "note": note}) if arguments.json else note)
        return
    device = torch.device("cuda", 0)
    rate = matrix_rate(device, MATRIX_SIZE, 20)
    chip = torch.cuda.get_device_name(device)
    rows: list[Row] = [{"model": chip, "work": "matmul", "tflops": round(rate / 1e12, 2)}]
    for shape, config in SHAPES.items():
        rows.extend(measure(shape, config, Load(), device, rate, arguments.repeats))
        torch.cuda.empty_cache()
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    print(*("  ".join(f"{name}={value}" for name, value in row.items()) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
