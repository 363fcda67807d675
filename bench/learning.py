"""CPU seconds of the learner's pass, forward and backward, with and without shared prompts.

Groups of `group` completions of one prompt go through a LoRA policy: packed behind one copy of the
prompt (lm/packing.py), and as rows of their own. Rounds of the two alternate; figures are medians
per completion. `ratio` is rows / packed, `tokens` the same of the tokens that the model read, and
`difference` the largest between their log-probabilities, in nats.

    python bench/learning.py [--json] [--repeats N]
"""

import statistics
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
from torch import Tensor, nn

from bench.command import run_cases
from bench.scoring import random_model
from lm import scoring
from lm.actions import ActionSpace
from lm.config import LoRAConfig
from lm.model import LanguageModel, attach_adapter
from lm.packing import SHARED_WIDTH, pack
from lm.scoring import completion_log_probs

GROUPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`GROUPS` prompts of `prompt` tokens, `group` completions of at most `length` each."""

    shape: str = "llama 2.6M"
    prompt: int
    length: int
    group: int = 10


CASES = (
    Case(prompt=20, length=10),
    Case(prompt=20, length=40),
    Case(prompt=80, length=12),
    Case(prompt=160, length=20),
    Case(shape="gpt2 2.5M", prompt=80, length=12),
)


def random_texts(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(0)
    prompts, completions = [], []
    for _ in range(GROUPS):
        prompt = rng.integers(2, 1000, case.prompt).tolist()
        for _ in range(case.group):
            prompts.append(prompt)
            length = rng.integers(case.length // 2, case.length + 1)
            completions.append(rng.integers(2, 1000, length).tolist())
    return prompts, completions


def measure(case: Case, repeats: int) -> dict[str, object]:
    base = LanguageModel(model=random_model(case.shape), tokenizer=None, fingerprint="")
    model = attach_adapter(base, LoRAConfig(), seed=0)
    actions = ActionSpace(stop_token=1, legal_tokens=None, min_len=0, max_len=case.length)
    prompts, completions = random_texts(case)

    def learn(shared_width: int) -> tuple[float, Tensor]:
        start_s = time.process_time()
        with mock.patch.object(scoring, "SHARED_WIDTH", shared_width):
            log_q_BT = _pass(model, actions, prompts, completions)
        return time.process_time() - start_s, log_q_BT

    difference = (learn(SHARED_WIDTH)[1] - learn(0)[1]).abs().max()  # also the warm-up
    rounds = [(learn(SHARED_WIDTH)[0], learn(0)[0]) for _ in range(repeats)]
    packed_s, rows_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    packed, rows = (
        pack(prompts, completions, shared_width=width).ids_RW.size for width in (SHARED_WIDTH, 0)
    )
    return {
        "model": case.shape,
        "prompt": case.prompt,
        "length": case.length,
        "group": case.group,
        "packed_ms": round(1e3 * packed_s / len(prompts), 2),
        "rows_ms": round(1e3 * rows_s / len(prompts), 2),
        "ratio": round(rows_s / packed_s, 2),
        "tokens": round(rows / packed, 2),
        "difference": float(difference),
    }


def _pass(
    model: nn.Module,
    actions: ActionSpace,
    prompts: list[list[int]],
    completions: list[list[int]],
) -> Tensor:
    """[B, T] log q of the tokens; the adapter's gradient is thrown away."""
    marks = [[False] * len(completion) for completion in completions]
    log_probs = completion_log_probs(model, actions, prompts, completions, marks)
    (log_probs.log_pf_BT.sum() + log_probs.log_stop_BS.sum()).backward()
    model.zero_grad()
    return log_probs.log_pf_BT.detach()


if __name__ == "__main__":
    run_cases(__doc__, measure, CASES)
