"""vLLM under the policy's law: what it draws, and what it says of that, against plain passes.

`make test-vllm` runs them, in an environment of their own.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from actors.config import ActorConfig
from actors.engine import EngineRefused, vllm_engine
from actors.protocols import RolloutEngine
from bench.posterior import CONFIG, RUN, run_condition
from cluster.__main__ import main
from lm.actions import ActionSpace
from lm.adapter import adapter_bytes, save_adapter
from lm.config import LMConfig, LoRAConfig
from lm.export import export_policy
from lm.hub import load_tokenizer
from lm.model import CausalLM, attach_adapter, load_base
from lm.sampling import Completion, Request
from lm.spelling import spell
from lm.tools import Tool, ToolFault, TriggerText, is_called
from seed_lm import toy
from tests.environment import MODEL
from tests.sampling_toy import exact_probabilities, worst_disagreement
from tests.tiny_lm import tiny_config

# Of many libraries, at whose warnings nobody here looks.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
vllm = pytest.importorskip("vllm", reason="the environment of `make test-vllm` has it")

LoRARequest = pytest.importorskip("vllm.lora.request").LoRARequest

# What vLLM finds out about an architecture by a process of its own.
os.environ["VLLM_CACHE_ROOT"] = str(Path(sys.prefix) / "vllm-cache")
ROOT = Path(__file__).resolve().parent.parent
SEED_LM, TOY = str(ROOT / "seed_lm" / "model"), str(ROOT / "tasks" / "toy" / "model")
VLLM = "actors.engine=vllm"
LORA = LoRAConfig(rank=8, alpha=16)
ON_ATTENTION = LORA.model_copy(update={"targets": "attention"})
STOP, CALL, MUTE = 40, 78, 65  # two tokens that the seed LM likes, so that both are called
LEGAL = tuple(range(30, 90))
TOLERANCE_NATS = 1e-4


class Interjection:
    """Behind CALL it writes three tokens, one of them no action of the policy's; else nothing."""

    triggers: Collection[int] = frozenset({CALL, MUTE})

    def output(self, completion: Sequence[int]) -> list[int]:
        return [7, CALL, 30 + len(completion) % 9] if completion[-1] == CALL else []


class Aside:
    """Behind a comma it writes a word and what is no action of the policy's."""

    def __init__(self, comma: int, stop: int) -> None:
        self.triggers, self._text = frozenset({comma}), [stop + 1, 300, stop + 2]

    def output(self, completion: Sequence[int]) -> list[int]:
        return self._text


class Indefinite(Interjection):
    """Behind "at", of two tokens, it writes the beginning of another; after any "t" vLLM stops."""

    def __init__(self) -> None:
        self.triggers = TriggerText(load_tokenizer(LMConfig(model=SEED_LM)), "at")

    def output(self, completion: Sequence[int]) -> list[int]:
        return [7, MUTE] if len(completion) % 3 else []


def law(min_len: int, max_len: int, **narrower: Any) -> ActionSpace:
    rules = {"legal_tokens": LEGAL} | narrower
    return ActionSpace(stop_token=STOP, min_len=min_len, max_len=max_len, **rules)


LAWS: dict[str, tuple[ActionSpace, Tool | None]] = {
    "min_len": (law(4, 24), None),
    "tool": (law(2, 24), Interjection()),
    "behind a text": (law(2, 24), Indefinite()),
    "stop after tool": (law(0, 16, stop_after_tool=True), Interjection()),
    "stop behind": (law(1, 16, stop_behind=frozenset({50, 51, 52})), None),
    "stop every": (law(2, 17, stop_every=5), Interjection()),
    "any token": (law(2, 12, legal_tokens=None), None),
    "forced at once": (law(0, 0), None),
}


def engine_of(
    lm: LMConfig,
    actions: ActionSpace,
    tool: Tool | None = None,
    *,
    max_rows: int = 16,
    lora: LoRAConfig = LORA,
) -> RolloutEngine:
    config = ActorConfig(engine="vllm", max_rows=max_rows)
    return vllm_engine(lm, config, actions, tool, lora=lora, longest_prompt=200, seed=1)


def perturb(model: Any, seed: int, scale: float = 0.05) -> bytes:
    """Another adapter into `model`, and its bytes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return adapter_bytes(model)


def requests_of(count: int) -> list[Request]:
    """Few prompts, some longer than a block of vLLM's cache, at several temperatures."""
    prompts = [tuple(range(100, 100 + length)) for length in (3, 40, 140, 200)]
    return [
        Request(prompt=prompts[i * 7 % 4], temperature=(1.0, 0.4, 3.0)[i % 3]) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "lora"), [*((name, LORA) for name in LAWS), ("min_len", ON_ATTENTION)]
)
def test_what_it_records_is_what_the_learner_computes(name: str, lora: LoRAConfig) -> None:
    actions, tool = LAWS[name]
    lm = LMConfig(model=SEED_LM)
    engine, requests = engine_of(lm, actions, tool, lora=lora), requests_of(48)
    policy: CausalLM = load_base(lm).model
    drawn = engine.sample(requests)
    assert worst_disagreement(policy, actions, requests, drawn) < TOLERANCE_NATS
    policy = attach_adapter(load_base(lm), lora, seed=0)
    for version in (1, 2):  # the second with prompts in the cache that the first has read
        engine.load(perturb(policy, version))
        drawn = engine.sample(requests)
        assert worst_disagreement(policy, actions, requests, drawn) < TOLERANCE_NATS
        for completion in drawn:
            actions.check(completion.tokens.tolist(), completion.from_tool.tolist())
    if tool is not None:
        for completion in drawn:  # each insertion stands behind a call
            tokens, marks = completion.tokens.tolist(), completion.from_tool.tolist()
            begun = (n for n in range(1, len(marks)) if marks[n] and not marks[n - 1])
            assert all(is_called(tool, tokens[:n], marks[:n]) for n in begun)
        assert any(completion.from_tool.any() for completion in drawn)
        assert not all(completion.from_tool.any() for completion in drawn)


class Hesitant(Interjection):
    """Speaks once it is let to, and fails behind every fifth token."""

    def __init__(self) -> None:
        self.may_speak = threading.Event()

    def output(self, completion: Sequence[int]) -> list[int]:
        assert self.may_speak.wait(60.0)
        if len(completion) % 5 == 0:
            raise KeyError("five")
        return super().output(completion)


def test_a_tool_delays_and_ends_its_own_row_only() -> None:
    actions, tool, lm = law(2, 24), Hesitant(), LMConfig(model=SEED_LM)
    engine, requests = engine_of(lm, actions, tool), requests_of(48)
    numbers, ended = engine.submit(requests), dict[int, Any]()
    for _ in range(3 * actions.max_len):
        ended |= engine.poll()
    assert len(ended) > 5 and not any(one.from_tool.any() for one in ended.values())
    polls, started_s = 0, time.monotonic()
    while time.monotonic() - started_s < 0.5:
        ended |= engine.poll()
        polls += 1
    assert polls < 60
    tool.may_speak.set()
    while len(ended) < len(numbers):
        ended |= engine.poll()
    faults = [one for one in ended.values() if isinstance(one, ToolFault)]
    assert {fault.reason for fault in faults} == {"KeyError: 'five'"}
    kept = [place for place, n in enumerate(numbers) if isinstance(ended[n], Completion)]
    drawn, asked = [ended[numbers[n]] for n in kept], [requests[n] for n in kept]
    assert any(one.from_tool.any() for one in drawn)
    assert worst_disagreement(load_base(lm).model, actions, asked, drawn) < TOLERANCE_NATS


@pytest.mark.timeout(1500)
def test_of_a_pretrained_model_it_records_what_the_learner_computes() -> None:
    lm = LMConfig(model=os.environ.get(MODEL, SEED_LM), dtype="float32", device="cpu")
    base = load_base(lm)
    tokenizer = base.tokenizer
    (stop,), (call,) = (tokenizer.encode(text, add_special_tokens=False) for text in (".", ","))
    letters = {i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip().isalpha()}
    legal = tuple(sorted({*letters, call}))
    actions = ActionSpace(stop_token=stop, legal_tokens=legal, min_len=3, max_len=16)
    texts = ("The old gardener said", "On the first day of school, when nobody knew,")
    prompts = [spell(tokenizer, text) for text in texts]
    requests = [
        Request(prompt=prompts[i % 2], temperature=(1.0, 0.5, 2.0)[i % 3]) for i in range(12)
    ]
    engine = engine_of(lm, actions, Aside(call, stop), max_rows=8)
    policy = attach_adapter(base, LORA, seed=0)
    engine.load(perturb(policy, 1, 0.02))
    drawn = engine.sample(requests)
    worst = worst_disagreement(policy, actions, requests, drawn)
    inserted = [bool(completion.from_tool.any()) for completion in drawn]
    print(f"{worst:.2e} nats over {sum(len(c.tokens) for c in drawn)} tokens; tools {inserted}")
    assert worst < TOLERANCE_NATS
    assert any(inserted) and not all(inserted)


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's model with one head, as wide as vLLM's kernels for CPUs take them."""
    folder = tmp_path_factory.mktemp("toy")
    toy.make(folder, seed=0, heads=1)
    return folder


@pytest.mark.parametrize("min_len", [0, 2])
def test_samples_follow_the_exact_distribution(min_len: int, toy_model: Path) -> None:
    lm = LMConfig(model=str(toy_model))
    actions = ActionSpace(stop_token=0, legal_tokens=(1, 2, 3, 4), min_len=min_len, max_len=3)
    engine, model = engine_of(lm, actions, max_rows=256), load_base(lm).model
    count, prompt = 2000, (5, 2)
    temperatures = (1.0, 0.5, 2.0)
    drawn = engine.sample([Request(prompt=prompt, temperature=t) for t in temperatures * count])
    for number, temperature in enumerate(temperatures):
        exact = exact_probabilities(model, actions, prompt, temperature)
        seen = Counter(tuple(c.tokens.tolist()) for c in drawn[number::3])
        assert seen.keys() <= exact.keys()
        common = {z: p for z, p in exact.items() if p * count >= 5}
        chi2 = sum((seen[z] - p * count) ** 2 / (p * count) for z, p in common.items())
        freedom = len(common) - 1
        # Wilson-Hilferty: the cube root of chi2 / freedom is nearly normal; 4 sigma.
        z_score = ((chi2 / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
        assert z_score < 4.0, (temperature, chi2, freedom)


@pytest.mark.timeout(1500)
def test_one_process_ends_at_the_exact_posterior(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", CONFIG, "--run", RUN, "--local", VLLM, f"lm.model={toy_model}"]) == 0
    capsys.readouterr()
    assert main(["posterior", f"runs/{RUN}/config.toml", "--run", RUN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tv"] <= 0.05


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_distributed_job_ends_at_the_exact_posterior(
    seed: int, toy_model: Path, tmp_path: Path
) -> None:
    assert run_condition("plain", seed, tmp_path, [VLLM, f"lm.model={toy_model}"]).tv <= 0.05


@pytest.mark.parametrize("merge", [False, True])
def test_plain_vllm_computes_of_an_export_what_the_learner_does(
    merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # seconds rather than minutes
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    lm, ids = LMConfig(model=SEED_LM), list(range(40, 140))
    base = load_base(lm)
    policy = attach_adapter(base, LORA, seed=0)
    perturb(policy, 1)
    adapter, folder = tmp_path / "adapter", tmp_path / "exported"
    save_adapter(policy, adapter, base.fingerprint)
    actions = law(2, 24)
    export_policy(lm, adapter, folder, actions=actions, merge=merge, dtype=None, card="")
    plain = vllm.LLM(
        model=str(folder) if merge else SEED_LM,
        tokenizer=str(folder),
        generation_config=str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(ids) + actions.max_len,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**26,
        enable_lora=not merge,
        max_lora_rank=LORA.rank,
    )
    request = None if merge else LoRARequest("exported", 1, str(folder))
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    (found,) = plain.generate({"prompt_token_ids": ids}, asked, lora_request=request)
    seen = zip(ids[1:], found.prompt_logprobs[1:], strict=True)
    told_T = torch.tensor([tokens[i].logprob for i, tokens in seen])

    def log_p(model: Any) -> Tensor:
        with torch.no_grad():
            log_p_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return log_p_TV[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]

    assert (told_T - log_p(policy)).abs().max() < TOLERANCE_NATS
    assert (told_T - log_p(load_base(lm).model)).abs().max() > 100 * TOLERANCE_NATS
    # As a server takes them from the folder's generation configuration.
    own = plain.get_default_sampling_params()
    assert (own.temperature, own.top_k, own.top_p, own.max_tokens) == (1.0, 0, 1.0, 24)
    text = "1 + 2 ="
    assert plain.get_tokenizer().encode(text) == AutoTokenizer.from_pretrained(SEED_LM).encode(text)


def test_what_cannot_be_served_is_refused_in_a_sentence(tmp_path: Path) -> None:
    GPT2LMHeadModel(tiny_config("gpt2")).save_pretrained(tmp_path)
    for file in Path(TOY).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    actions = ActionSpace(stop_token=0, legal_tokens=(1, 2), min_len=0, max_len=3)
    # No adapters for this architecture, and no kernels for heads as narrow as the toy's.
    for model, said in ((str(tmp_path), "LoRA"), (TOY, "head_dim=16")):
        with pytest.raises(EngineRefused, match=rf"cannot serve model .*{said}.*another base"):
            engine_of(LMConfig(model=model), actions)
