"""Share of the machine's matrix rate that rollouts, scoring and learning reach on a pretrained LM.

On the CPU, in float32, on as many threads as torch has (OMP_NUM_THREADS): 64 rollouts, eight
groups of eight, their rewards in packed passes, and one SubTB update of 32 completions with LoRA of
rank 16 on every linear layer, activations kept. `gflops` counts useful multiply-adds in the weight
matrices, as bench/gpu.py does; `share_of_gemm` is that over the rate of a large float32 product,
measured before and after each phase in the same run, the better of the two. Times are medians.

    python bench/real.py MODEL [--json] [--repeats N]

MODEL is a folder in Hugging Face format or a hub id, such as HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu import (
    Load,
    Weights,
    matrix_rate,
    measure_sampling,
    measure_scoring,
    measure_update,
)
from lm.config import LMConfig, LoRAConfig
from lm.model import LanguageModel, attach_adapter, load_base

LOAD = Load(
    prompts=8, group=8, prompt=40, completion=20, token_budget=2048, update_rows=32, rank=16
)
MATRIX_SIZE = 2048

Measured = tuple[float, int, float]  # seconds, tokens, useful operations
Row = dict[str, Any]


def learning(base: LanguageModel, load: Load, repeats: int) -> Measured:
    """The update, with an adapter that goes into `base` and stays there."""
    weights = Weights.of(base.model)
    adapter = LoRAConfig(rank=load.rank, alpha=2.0 * load.rank)
    policy = attach_adapter(base, adapter, seed=0)
    return measure_update(base.model, policy, weights, load, repeats)


def measure(base: LanguageModel, load: Load, size: int, repeats: int) -> Iterator[Row]:
    """A row for each phase; what is learned is measured last, for it changes the model."""
    phases: dict[str, Callable[[], Measured]] = {
        "rollouts": partial(measure_sampling, base.model, load, repeats),
        "scoring": partial(measure_scoring, base.model, load, repeats),
        "learning": partial(learning, base, load, repeats),
    }
    rate = partial(matrix_rate, torch.device("cpu"), size, repeats, torch.float32)
    for phase, work in phases.items():
        before = rate()
        spent_s, tokens, flops = work()
        best = max(before, rate())
        yield {
            "phase": phase,
            "ms": round(1e3 * spent_s, 1),
            "tokens_per_s": round(tokens / spent_s, 1),
            "gflops": round(flops / spent_s / 1e9, 2),
            "gemm_gflops": round(best / 1e9, 2),
            "share_of_gemm": round(flops / spent_s / best, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder in Hugging Face format, or hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each phase")
    arguments = parser.parse_args()
    base = load_base(LMConfig(model=arguments.model, device="cpu"))
    rows = []
    for row in measure(base, LOAD, MATRIX_SIZE, arguments.repeats):
        rows.append(row)
        if not arguments.json:
            print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    if arguments.json:
        threads = torch.get_num_threads()
        print(json.dumps({"model": arguments.model, "threads": threads, "rows": rows}))


if __name__ == "__main__":
    main()
