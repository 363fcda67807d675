"""Tokens per CPU second of the rollout engines, and of transformers' generate, in turns.

All draw groups from the same law under the same adapter: completions of one length, or "ragged", of
20 to 500 tokens as the model ends its sentences. The engines stream, as actors have them, and
record log-probabilities. "batches" is the native sampler where all rows wait for the longest, and
`times_batches` the ratio to it, in this one run. generate draws batch after batch, too, has the
adapter folded in, and keeps no log-probabilities. One thread. Without vLLM there are no rows of it.

    python bench/engines.py [--json] [--repeats N] [--models FOLDER ...] [--lengths 50 200 ragged]
                            [--engines native batches ...]
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from actors.config import ActorConfig
from actors.engine import NativeEngine, vllm_engine
from actors.protocols import RolloutEngine
from lm.actions import ActionSpace
from lm.adapter import adapter_bytes
from lm.config import LMConfig, LoRAConfig
from lm.merged import MergedModel
from lm.model import CausalLM, attach_adapter, load_base, vocab_size
from lm.sampling import Request, Sampler
from lm.spelling import spell
from lm.tools import unfailing

SEED_LM = str(Path(__file__).resolve().parent.parent / "seed_lm" / "model")
LORA = LoRAConfig(rank=16, alpha=16)
TEXTS = (
    "Mia looked for the red kite all morning, and found it",
    "The rain had stopped before the two brothers",
    "On the first day of school nobody knew",
    "There was one more thing that the old gardener",
)
RAGGED = "ragged"
ENGINES = ("native", "batches", "generate", "vllm")
SHORTEST, LONGEST, STEP = 20, 500, 8  # tokens; ragged completions may end at every STEP-th


class Law(LogitsProcessor):
    """Gives generate the action space, of rows that have all one length."""

    def __init__(self, actions: ActionSpace, vocabulary: int, prompt_length: int) -> None:
        self._actions, self._prompt_length = actions, prompt_length
        self._closed_V = torch.ones(vocabulary, dtype=torch.bool)
        self._closed_V[torch.from_numpy(actions.columns(vocabulary))] = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1] - self._prompt_length
        closed_V = self._closed_V.clone()
        closed_V[self._actions.stop_token] = not self._actions.may_stop(length, 0, False)
        return scores.masked_fill(closed_V, -torch.inf)


def adapter_of(lm: LMConfig) -> bytes:
    """An adapter that is not the identity."""
    torch.manual_seed(0)
    model = attach_adapter(load_base(lm), LORA, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.01)
    return adapter_bytes(model)


def streamed_by(engine: RolloutEngine, prompts: Sequence[tuple[int, ...]]) -> Callable[[int], int]:
    """Tokens of as many completions as there are prompts, as they end, as often as it is called.

    As an actor asks for them: a place that becomes free is taken by the next prompt, and what is
    under way at the end goes on in the next call.
    """
    asked = cycle(Request(prompt=prompt) for prompt in prompts)
    under_way = 0

    def draw(_: int) -> int:
        nonlocal under_way
        tokens, left = 0, len(prompts)
        while left > 0:
            engine.submit(list(islice(asked, len(prompts) - under_way)))
            ended = engine.poll()
            under_way, left = len(prompts) - len(ended), left - len(ended)
            tokens += sum(len(one.tokens) for one in unfailing([one for _, one in ended]))
        return tokens

    return draw


def batched_by(sampler: Sampler, prompts: Sequence[tuple[int, ...]]) -> Callable[[int], int]:
    """Likewise batch after batch, each to its end."""
    requests = [Request(prompt=prompt) for prompt in prompts]

    def draw(seed: int) -> int:
        drawn = sampler.sample(requests, torch.Generator().manual_seed(seed))
        return sum(len(one.tokens) for one in drawn)

    return draw


def generated_by(
    model: CausalLM, actions: ActionSpace, prompts: Sequence[tuple[int, ...]]
) -> Callable[[int], int]:
    """Likewise by generate, which takes prompts of one length: the last tokens of each."""
    width = min(len(prompt) for prompt in prompts)
    ids = torch.tensor([prompt[-width:] for prompt in prompts])
    law = LogitsProcessorList([Law(actions, vocab_size(model), width)])

    def draw(seed: int) -> int:
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=actions.max_len,
            logits_processor=law,
            eos_token_id=actions.stop_token,
            pad_token_id=actions.stop_token,
        )
        ended = (output[:, width:] == actions.stop_token).int().cumsum(1).bool()
        return int((~ended).sum())

    return draw


def measure(
    model: str, length: str, rows: int, repeats: int, engines: Sequence[str]
) -> list[dict[str, object]]:
    """A row for each engine: the fastest of `repeats` rounds, in each of which all take a turn."""
    lm = LMConfig(model=model, device="cpu")
    base, adapter = load_base(lm), adapter_of(lm)
    shortest, longest = (SHORTEST, LONGEST) if length == RAGGED else (int(length), int(length))
    actions = ActionSpace(
        stop_token=base.tokenizer.encode(".", add_special_tokens=False)[0],
        legal_tokens=None,
        min_len=shortest,
        max_len=longest,
        stop_every=STEP,
    )
    spelled = [spell(base.tokenizer, text) for text in TEXTS]
    prompts = [spelled[number * len(spelled) // rows] for number in range(rows)]
    native = NativeEngine(base, actions, None, lora=LORA, max_rows=rows, seed=0)
    native.load(adapter)
    plain = load_base(lm)
    MergedModel(plain).load(adapter)
    sides = {
        "native": streamed_by(native, prompts),
        "batches": batched_by(Sampler(plain.model, actions, None, max_rows=rows), prompts),
        "generate": generated_by(plain.model, actions, prompts),
    }
    if "vllm" in engines and importlib.util.find_spec("vllm") is not None:
        settings = ActorConfig(engine="vllm", max_rows=rows)
        width = max(len(prompt) for prompt in spelled)
        vllm = vllm_engine(lm, settings, actions, None, lora=LORA, longest_prompt=width, seed=0)
        vllm.load(adapter)
        sides["vllm"] = streamed_by(vllm, prompts)
    sides = {engine: draw for engine, draw in sides.items() if engine in engines}
    torch.set_num_threads(1)
    best = dict.fromkeys(sides, 0.0)
    for round_ in range(repeats + 1):  # the first, in which caches are filled, does not count
        for engine, draw in sides.items():
            start_s = time.process_time()
            rate = draw(round_) / (time.process_time() - start_s)
            best[engine] = max(best[engine], rate if round_ else 0.0)
    case = {"model": Path(model).name if model != SEED_LM else "seed_lm", "rows": rows}
    return [
        {"engine": engine}
        | case
        | {"length": length, "tokens_per_s": round(rate, 1)}
        | ({"times_batches": round(rate / best["batches"], 2)} if "batches" in best else {})
        for engine, rate in best.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds")
    parser.add_argument("--models", nargs="+", default=[SEED_LM], help="folders of base models")
    parser.add_argument("--lengths", nargs="+", default=["50", "200", "500", RAGGED])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--rows", type=int, default=32, help="completions under way at once")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for model in arguments.models:
        for length in arguments.lengths:
            rows = measure(model, length, arguments.rows, arguments.repeats, arguments.engines)
            found += rows
            if not arguments.json:
                for row in rows:
                    print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    if arguments.json:
        print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
