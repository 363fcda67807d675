"""Tokens per CPU second of our sampler against transformers' generate, on a model of seed size.

Both draw the same groups from the same random weights with the same legal tokens; only tokens up
to a row's end count. generate keeps no log-probabilities; ours records them. One thread.

    python bench/sampling.py [--json] [--repeats N]
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bench.command import run_cases
from lm.actions import ActionSpace
from lm.adapter import adapter_bytes
from lm.config import LoRAConfig
from lm.merged import MergedModel
from lm.model import LanguageModel, attach_adapter, freeze
from lm.sampling import Request, Sampler

STOP = 1
LEGAL = tuple(range(2, 26))
PROMPT_LEN = 24
MAX_LEN = 40


@dataclass(frozen=True, slots=True)
class Case:
    """One workload: `prompts` groups of `group` completions each."""

    prompts: int
    group: int
    min_len: int  # tokens; MAX_LEN makes all rows end together
    adapter: str  # "none", "unmerged" or "merged"; generate always runs without one


CASES = (
    Case(prompts=4, group=8, min_len=0, adapter="none"),
    Case(prompts=16, group=8, min_len=0, adapter="none"),
    Case(prompts=16, group=32, min_len=0, adapter="none"),
    Case(prompts=16, group=8, min_len=MAX_LEN, adapter="none"),
    Case(prompts=16, group=8, min_len=0, adapter="merged"),
    Case(prompts=16, group=8, min_len=0, adapter="unmerged"),
)


class LegalOnly(LogitsProcessor):
    """Gives generate the action space: illegal tokens never, stop not before min_len."""

    def __init__(self, actions: ActionSpace, vocab_size: int) -> None:
        self._actions = actions
        self._open = torch.ones(vocab_size, dtype=torch.bool)
        self._open[torch.from_numpy(actions.columns(vocab_size))] = False
        self._closed = self._open.clone()
        self._closed[actions.stop_token] = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        may_stop = input_ids.shape[1] - PROMPT_LEN >= self._actions.min_len
        return scores.masked_fill(self._open if may_stop else self._closed, -torch.inf)


def random_llama() -> PreTrainedModel:
    """About a million parameters: 4 layers of width 128, 1000 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=344,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    freeze(model)
    return model


def with_adapter(kind: str) -> torch.nn.Module:
    """The random model with no adapter, or a fresh one, as `kind` says."""
    base = LanguageModel(
        model=random_llama(), tokenizer=PreTrainedTokenizerFast, fingerprint="random"
    )
    if kind == "none":
        return base.model
    adapted = attach_adapter(base, LoRAConfig(rank=16, alpha=16.0), seed=0)
    if kind == "unmerged":
        return adapted
    merged = MergedModel(
        LanguageModel(model=random_llama(), tokenizer=base.tokenizer, fingerprint="random")
    )
    merged.load(adapter_bytes(adapted))
    return merged.model


def our_tokens(sampler: Sampler, prompts: Sequence[tuple[int, ...]], seed: int) -> int:
    requests = [Request(prompt=prompt) for prompt in prompts]
    completions = sampler.sample(requests, torch.Generator().manual_seed(seed))
    return sum(len(completion.tokens) for completion in completions)


def generated_tokens(
    model: PreTrainedModel,
    processors: LogitsProcessorList,
    prompts: Sequence[tuple[int, ...]],
    seed: int,
) -> int:
    torch.manual_seed(seed)
    ids = torch.tensor(prompts)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_LEN,
        logits_processor=processors,
    )
    ended = (output[:, PROMPT_LEN:] == STOP).int().cumsum(1).bool()
    return int((~ended).sum())


def tokens_per_s(draw: Callable[[int], int], repeats: int) -> float:
    """Fastest of `repeats` runs by CPU time, so that other work on the machine counts little."""
    draw(0)
    best = 0.0
    for seed in range(1, repeats + 1):
        start_s = time.process_time()
        tokens = draw(seed)
        best = max(best, tokens / (time.process_time() - start_s))
    return best


def measure(case: Case, repeats: int) -> dict[str, object]:
    actions = ActionSpace(
        stop_token=STOP, legal_tokens=LEGAL, min_len=case.min_len, max_len=MAX_LEN
    )
    rng = torch.Generator().manual_seed(1)
    drawn = torch.randint(2, 1000, (case.prompts, PROMPT_LEN), generator=rng).tolist()
    prompts = [tuple(prompt) for prompt in drawn for _ in range(case.group)]
    sampler = Sampler(with_adapter(case.adapter), actions, None, max_rows=len(prompts))
    plain = random_llama()
    processors = LogitsProcessorList([LegalOnly(actions, plain.config.vocab_size)])
    ours = tokens_per_s(lambda seed: our_tokens(sampler, prompts, seed), repeats)
    theirs = tokens_per_s(lambda seed: generated_tokens(plain, processors, prompts, seed), repeats)
    return {
        "rows": len(prompts),
        "prompts": case.prompts,
        "endings": "together" if case.min_len == MAX_LEN else "ragged",
        "adapter": case.adapter,
        "sampler_tokens_per_s": round(ours),
        "generate_tokens_per_s": round(theirs),
        "ratio": round(ours / theirs, 2),
    }


if __name__ == "__main__":
    run_cases(__doc__, measure, CASES)
