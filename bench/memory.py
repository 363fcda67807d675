"""Peak memory of learner, scorer and sampler, over that of the loaded model, on CPU.

Every row is a process of its own: it loads the model, makes one tiny pass, notes its resident
memory, does the row's work once and reports by how much the peak exceeds the note. `planned_mb`
is what `amortize plan` says of the same sizes, `before_mb` what was measured before memory was
bounded.

    learner   one step over `groups` groups of `group` completions of `length` tokens
    scorer    log-rewards of `group` rationales of `length` tokens, |Y| = `answer`, all prefixes
    sampler   `group` completions of `length` tokens

    python bench/memory.py [--json] [--model FOLDER] [--only PART]

FOLDER holds a causal LM in Hugging Face format; without one only random models are measured.
Linux only: the peak is read from /proc.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from learner.config import LearnerConfig
from learner.engine import TorchEngine
from learner.learner import Learner
from learner.memory import adapter_bytes_held, longest_group, update_bytes
from learner.objectives.subtb import SubTB
from lm.actions import ActionSpace
from lm.config import LoRAConfig
from lm.memory import draw_bytes, kv_cache_bytes
from lm.model import (
    LanguageModel,
    attach_adapter,
    freeze,
    is_large,
    return_freed_memory,
    vocab_size,
)
from lm.sampling import Request, Sampler
from reward.memory import longest_items, scoring_bytes
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem

STOP = 0
REAL = "folder"  # the model that `--model` names


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    part: str
    model: str = REAL
    vocab: int = 49_152  # of a random model
    groups: int = 1
    group: int
    prompt: int = 60
    length: int
    answer: int = 6
    token_budget: int
    before_mb: float | None = None


def learner_cases() -> list[Case]:
    def case(group: int, length: int, before_mb: float | None, **sizes: Any) -> Case:
        return Case(
            part="learner",
            group=group,
            length=length,
            token_budget=2048,
            before_mb=before_mb,
            **sizes,
        )

    real = [
        case(10, 56, 2755.1, groups=8),  # 5,000 tokens a step
        case(20, 28, 1668.8),
        case(40, 28, 4636.5),
        case(160, 28, None),
        case(20, 56, 4678.4),
        case(20, 224, None),
    ]
    vocabularies = {49_152: 471.1, 128_256: 1017.2, 262_144: 1934.8}
    random = [case(10, 40, mb, model="random", vocab=v) for v, mb in vocabularies.items()]
    return [*real, *random]


def scorer_cases() -> list[Case]:
    def case(length: int, answer: int, before_mb: float | None, **sizes: Any) -> Case:
        return Case(
            part="scorer",
            group=4,
            length=length,
            answer=answer,
            token_budget=2048,
            before_mb=before_mb,
            **sizes,
        )

    lengths = {20: 853.3, 50: 528.7, 100: 1027.1, 200: 2131.7}
    real = [case(length, 20, mb) for length, mb in lengths.items()]
    vocabularies = {49_152: 503.5, 128_256: 1241.7, 262_144: 2489.2}
    random = [case(50, 6, mb, model="random", vocab=v) for v, mb in vocabularies.items()]
    return [*real, *random]


def sampler_cases() -> list[Case]:
    return [Case(part="sampler", group=48, length=40, token_budget=0, before_mb=317.4)]


CASES = (*learner_cases(), *scorer_cases(), *sampler_cases())


def load(case: Case, folder: Path | None) -> LanguageModel:
    torch.manual_seed(0)
    if case.model == REAL:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(random_config(case))
    freeze(model)
    if is_large(model):
        return_freed_memory()
    return LanguageModel(model=model, tokenizer=None, fingerprint="")


def random_config(case: Case) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        tie_word_embeddings=True,
    )


def plan(case: Case, folder: Path | None) -> float:
    """MB, as `amortize plan` counts them."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder) if case.model == REAL else random_config(case)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    freeze(model)
    if case.part == "scorer":
        return scoring_bytes(model, rationales(case, vocab_size(model)), case.token_budget) / 2**20
    if case.part == "sampler":
        columns = case.prompt + case.length
        cache = kv_cache_bytes(model, rows=case.group, columns=columns)
        return (cache + draw_bytes(model, rows=case.group)) / 2**20
    policy = attach_adapter(
        LanguageModel(model=model, tokenizer=None, fingerprint=""), LoRAConfig(), seed=0
    )
    passes = update_bytes(
        policy,
        actions_of(case),
        learner_config(case),
        prompt_length=case.prompt,
        group_size=case.group,
    )
    return (adapter_bytes_held(policy) + passes) / 2**20


def actions_of(case: Case) -> ActionSpace:
    return ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=case.length)


def learner_config(case: Case) -> LearnerConfig:
    return LearnerConfig(
        steps=1, groups_per_step=case.groups, learning_rate=1e-4, token_budget=case.token_budget
    )


def learn(language_model: LanguageModel, case: Case) -> None:
    rng, size, actions = (
        np.random.default_rng(0),
        vocab_size(language_model.model),
        actions_of(case),
    )
    groups = [
        longest_group(actions, rng, prompt_length=case.prompt, size=case.group, vocab_size=size)
        for _ in range(case.groups)
    ]
    model, config = attach_adapter(language_model, LoRAConfig(), seed=0), learner_config(case)
    learner = Learner(
        model=model,
        actions=actions,
        replay=SimpleNamespace(draw=lambda request: groups),
        engine=TorchEngine(model, config),
        objective=SubTB(),
        config=config,
        weights=SimpleNamespace(publish=lambda data, **about: None),
        rng=rng,
    )
    learner.step()


def rationales(case: Case, vocab: int) -> list[ScoreItem]:
    return longest_items(
        context=case.prompt,
        length=case.length,
        answer=case.answer,
        stops=range(case.length + 1),
        number=case.group,
        vocab_size=vocab,
    )


def score(language_model: LanguageModel, case: Case) -> None:
    model = language_model.model
    suffix_log_rewards(model, rationales(case, vocab_size(model)), case.token_budget)


def sample(language_model: LanguageModel, case: Case) -> None:
    size = vocab_size(language_model.model)
    actions = ActionSpace(
        stop_token=STOP, legal_tokens=None, min_len=case.length, max_len=case.length
    )
    prompt = tuple(np.random.default_rng(0).integers(1, size, case.prompt).tolist())
    sampler = Sampler(language_model.model, actions, None, max_rows=case.group)
    sampler.sample([Request(prompt=prompt)] * case.group, torch.Generator().manual_seed(0))


WORK = {"learner": learn, "scorer": score, "sampler": sample}


def measure_here(case: Case, folder: Path | None) -> float:
    """MB by which the work of this process exceeds what it held before."""
    language_model = load(case, folder)
    tiny_pass(language_model.model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before_kb = memory_kb("VmRSS")
    WORK[case.part](language_model, case)
    return (memory_kb("VmHWM") - before_kb) / 1024


def tiny_pass(model: PreTrainedModel) -> None:
    """Forward and backward, for what libraries load or allocate but once."""
    weight = next(model.parameters()).requires_grad_(True)
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    weight.requires_grad_(False).grad = None


def memory_kb(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def measure(case: Case, folder: Path | None) -> dict[str, object]:
    """The row of a case, out of a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    command += [] if folder is None else ["--model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    row = dataclasses.asdict(case) | {"peak_mb": round(float(done.stdout), 1)}
    row["planned_mb"] = round(plan(case, folder), 1)
    return row if case.model != REAL else row | {"model": str(folder), "vocab": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", type=Path, help="folder of a causal LM")
    parser.add_argument("--only", choices=WORK, help="measure one part")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case is not None:
        print(measure_here(Case(**json.loads(arguments.case)), arguments.model))
        return
    rows = []
    for case in CASES:
        if arguments.only in (None, case.part) and (arguments.model or case.model != REAL):
            rows.append(measure(case, arguments.model))
            if not arguments.json:
                print(
                    *(f"{name}={value}" for name, value in rows[-1].items()), sep="  ", flush=True
                )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
