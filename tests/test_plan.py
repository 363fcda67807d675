"""`amortize plan`: memory is counted as it is taken, without weights; misfits are named."""

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cluster.__main__ import main
from cluster.commands.plan import device_memory_mb
from cluster.config.file import load_config
from cluster.config.project import PROJECT_ROOT, UserError
from cluster.run.plan import REMEDIES, check_memory, check_memory_here, plan_run
from learner.config import LearnerConfig
from learner.memory import adapter_bytes_held, longest_group, update_bytes
from lm.actions import ActionSpace
from lm.config import LMConfig, LoRAConfig
from lm.hub import load_tokenizer
from lm.memory import MemoryMeter, kv_cache_bytes, metered
from lm.model import LanguageModel, attach_adapter, build_without_weights, freeze
from lm.prefill import Prefill
from lm.sampling import Request, Sampler
from reward.memory import longest_items, scoring_bytes
from tasks.registry import build_task

CONFIG = "tasks/arithmetic.toml"
ACTIONS = ActionSpace(stop_token=0, legal_tokens=None, min_len=0, max_len=12)
LEARNER = LearnerConfig(
    steps=1, groups_per_step=3, learning_rate=1e-3, token_budget=256, checkpointing=False
)
SHAPE = {"vocab_size": 1536, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(**changes: int) -> LlamaConfig:
    return LlamaConfig(intermediate_size=96, num_key_value_heads=2, **SHAPE | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An architecture, and no weights at all."""
    llama().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PROJECT_ROOT / "seed_lm/model" / name, tmp_path)
    return tmp_path


def weightless(folder: Path) -> torch.nn.Module:
    return build_without_weights(LMConfig(model=str(folder), device="cpu"))


def with_adapter(model: Any) -> torch.nn.Module:
    unidentified = LanguageModel(model=model, tokenizer=None, fingerprint="")
    return attach_adapter(unidentified, LoRAConfig(rank=4), seed=0)


def test_the_meter_counts_what_is_alive_and_no_view_or_weight() -> None:
    weight = torch.ones(100)
    with MemoryMeter() as meter:
        view = weight.view(10, 10).t()
        first = view + 1  # 400 bytes
        second = first * 2  # 800
        assert meter.live_bytes == 800
        del first
        assert meter.live_bytes == 400
        second.add_(1)
        assert (meter.live_bytes, meter.peak_bytes) == (400, 800)


def test_the_copy_that_a_logsumexp_makes_is_counted() -> None:
    with MemoryMeter() as meter:
        logits = torch.ones(10, 100)
        assert logits.logsumexp(-1).shape == (10,)
        assert (meter.live_bytes, meter.peak_bytes) == (4000, 8000)


def test_what_autograd_keeps_is_alive() -> None:
    with MemoryMeter() as meter:
        grown = torch.ones(100, requires_grad=True) * 1.5
        loss = grown.exp().sum()  # keeps exp, which no name holds
        assert meter.live_bytes == 3 * 400 + 4
        del loss, grown
        assert meter.live_bytes == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_without_weights_takes_what_one_with_weights_takes(
    folder: Path, checkpointing: bool
) -> None:
    config = LEARNER.model_copy(update={"checkpointing": checkpointing})
    sizes = {"prompt_length": 20, "group_size": 6}
    planned = update_bytes(with_adapter(weightless(folder)), ACTIONS, config, **sizes)
    real = AutoModelForCausalLM.from_config(llama())
    freeze(real)
    taken = update_bytes(with_adapter(real), ACTIONS, config, **sizes)
    assert planned == pytest.approx(taken, rel=0.05)


def test_recomputing_and_a_smaller_budget_are_planned_with(folder: Path) -> None:
    def planned(**changes: object) -> int:
        config = LEARNER.model_copy(update=changes)
        model = with_adapter(weightless(folder))
        return update_bytes(model, ACTIONS, config, prompt_length=20, group_size=12)

    assert planned(checkpointing=True) < planned() / 1.5
    assert planned(token_budget=64) < planned() / 1.5


def test_an_update_takes_the_same_whatever_the_group_beyond_the_budget(folder: Path) -> None:
    model = with_adapter(weightless(folder))
    small, large = (
        update_bytes(model, ACTIONS, LEARNER, prompt_length=20, group_size=n) for n in (40, 320)
    )
    assert large < 1.5 * small  # rows that fill the budget to the brim, or not quite


def test_scoring_without_weights_takes_what_it_takes_with_weights(folder: Path) -> None:
    items = longest_items(
        context=20, length=30, answer=8, stops=range(31), number=4, vocab_size=1536
    )
    planned = scoring_bytes(weightless(folder), items, 256)
    real = AutoModelForCausalLM.from_config(llama())
    freeze(real)
    assert planned == pytest.approx(scoring_bytes(real, items, 256), rel=0.1)


def test_a_prefill_is_copied_for_its_texts_a_layer_at_a_time() -> None:
    states = [torch.ones(1, 2, 16, 4) for _ in range(2 * 8)]
    prefill, held = Prefill(states=states, logits_UV=torch.ones(1, 1)), 8 * 16 * states[0].nbytes
    with metered() as meter:
        cache = prefill.cache(0, copies=8)
    assert len(cache.layers) == 8 and meter.peak_bytes < 1.2 * held


def test_the_cache_of_the_sampler_is_as_large_as_planned(folder: Path) -> None:
    real = AutoModelForCausalLM.from_config(llama())
    freeze(real)
    actions = ActionSpace(stop_token=0, legal_tokens=None, min_len=12, max_len=12)
    sampler = Sampler(real, actions, None, max_rows=5)
    sampler.sample([Request(prompt=(1, 2, 3))] * 5, torch.Generator().manual_seed(0))
    cache = sampler._cache
    assert cache is not None
    held = sum(buffer.nbytes for buffer in cache._buffers)
    assert held == kv_cache_bytes(weightless(folder), rows=5, columns=15)


def test_rows_that_wait_for_tools_are_held_beside_the_cache_and_planned(folder: Path) -> None:
    real = AutoModelForCausalLM.from_config(llama())
    freeze(real)
    actions = ActionSpace(stop_token=0, legal_tokens=None, min_len=12, max_len=12)
    spoken = threading.Event()
    tool: Any = SimpleNamespace(triggers=range(1536), output=lambda _: [spoken.wait()][:0])
    sampler = Sampler(real, actions, tool, max_rows=5, steady=False)
    sampler.submit([Request(prompt=(1, 2, 3))] * 5)
    while len(sampler._parked) < 5:
        sampler.step(torch.Generator().manual_seed(0))
    spoken.set()
    waiting = [prefill for _, prefill in sampler._parked]
    states = sum(states.nbytes for prefill in waiting for states in prefill.states)
    columns = sampler._parked[0][0].position + 1
    assert states == kv_cache_bytes(weightless(folder), rows=5, columns=columns) > 0
    logits = sum(prefill.logits_UV.nbytes for prefill in waiting)
    assert logits == 5 * 1536 * 4
    config = load_config(CONFIG, [f"lm.model={folder}"])  # with a calculator
    actor = plan_run(config, on_gpu=True).parts[0].memory_mb
    planned_mb = actor["cache"] + config.actors.max_rows * 1536 * 4 / 2**20
    assert actor["rows that wait for tools"] == pytest.approx(planned_mb)
    toy = plan_run(load_config("tasks/toy.toml"), on_gpu=True).parts[0]
    assert "rows that wait for tools" not in toy.memory_mb


def test_the_evaluator_is_planned_with_its_own_rows_and_answers() -> None:
    def memory(*words: str) -> list[dict[str, float]]:
        plan = plan_run(load_config(CONFIG, words), on_gpu=True)
        return [dict(plan.parts[place].memory_mb) for place in (0, -1)]

    actor, evaluator = memory("evaluation.max_rows=128", "actors.max_rows=64")
    same_actor, smaller = memory("evaluation.max_rows=64", "actors.max_rows=64")
    assert same_actor == actor
    for cause in ("cache", "draws"):
        assert evaluator[cause] == pytest.approx(2 * smaller[cause])
    assert smaller["draws"] == actor["draws"] and smaller["cache"] > actor["cache"]
    crowded = load_config(CONFIG, ["evaluation.max_rows=40960"])
    with pytest.raises(UserError, match=r"evaluator needs .* lower evaluation\.max_rows"):
        check_memory(plan_run(crowded, on_gpu=True), 8 * 1024)


def test_weights_are_never_made(folder: Path) -> None:
    assert all(parameter.is_meta for parameter in weightless(folder).parameters())


def test_groups_are_legal_and_longest() -> None:
    actions = ActionSpace(stop_token=3, legal_tokens=(2, 3, 5), min_len=1, max_len=6)
    rng = np.random.default_rng(0)
    group = longest_group(actions, rng, prompt_length=4, size=3, vocab_size=9)
    for trajectory in group.fresh:
        assert trajectory.completion.size == 6 and set(trajectory.completion) <= {2, 5}
        actions.check(trajectory.completion.tolist(), [False] * 6)


def test_of_the_adapter_are_held_weights_and_moments(folder: Path) -> None:
    model = with_adapter(weightless(folder))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_bytes_held(model) == (1 + 2) * 4 * trained


def test_the_verb_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--gpu", "L4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["part"] for part in found["parts"]] == [
        *("rollout actor", "reward rank", "learner rank", "evaluator"),
    ]
    for part in found["parts"]:
        assert part["total_mb"] == pytest.approx(sum(part["memory_mb"].values()), abs=0.5)
        assert part["memory_mb"]["CUDA"] > 0
    assert found["fits"] and found["device"] == "gpu" and found["parameters"] > 5e5


def test_an_actor_of_vllm_is_planned_as_vllm_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for engine in ("native", "vllm"):
        words = ["plan", CONFIG, "--gpu", "L4", "--json", f'actors.engine="{engine}"']
        assert main([*words, "lm.dtype=bfloat16"]) == 0
        parts = json.loads(capsys.readouterr().out)["parts"]
        found[engine] = {part["part"]: part["memory_mb"] for part in parts}
    native, vllm = (found[engine]["rollout actor"] for engine in ("native", "vllm"))
    assert vllm["weights"] == native["weights"] and "adapted weights" not in vllm
    # Blocks of 128 tokens, and one row more than asked.
    config = load_config(CONFIG)
    shape = build_without_weights(config.lm.model_copy(update={"dtype": "bfloat16"}))
    task = build_task(config.task, load_tokenizer(config.lm), seed=0)
    longest = max(len(prompt.prompt) for prompt in task.prompts) + task.actions.max_len
    assert 0 < longest <= 128
    cache = kv_cache_bytes(shape, rows=config.actors.max_rows + 1, columns=128)
    assert vllm["cache"] == pytest.approx(cache / 2**20, abs=0.1)
    # At least a layer's input, the two halves of its MLP, and their product.
    wide = shape.config.hidden_size + 3 * shape.config.intermediate_size
    assert vllm["prompts"] > 2048 * 2 * wide / 2**20
    # Of ours at least the keys of the prompts that are kept, an eighth of the rows.
    kept = kv_cache_bytes(shape, rows=8, columns=longest - task.actions.max_len)
    assert config.actors.max_rows == 64 and native["prompts"] > kept / 2**20
    assert found["vllm"]["evaluator"] == found["native"]["evaluator"]  # samples by our own


def test_what_does_not_fit_is_named_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["actors.max_rows=4096", "task.max_len=120"]
    assert main(["plan", CONFIG, *wide, "--gpu", "2GB"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "rollout actor needs" in said and "actors.max_rows" in said
    plan = plan_run(load_config(CONFIG, wide), on_gpu=True)
    with pytest.raises(UserError, match=r"does not fit: rollout actor needs [\d.]+ GB and has 2"):
        check_memory(plan, 2048)
    check_memory(plan, 64 * 1024)


def test_whatever_takes_most_has_a_remedy() -> None:
    causes = set[str]()
    for changes in ([], ["task.reward_demonstrations=2"], ["reward.ranks=2"]):
        config = load_config(CONFIG, changes)
        causes |= {
            cause for part in plan_run(config, on_gpu=True).parts for cause in part.memory_mb
        }
    assert causes == set(REMEDIES)


def test_without_gpus_all_parts_share_the_host() -> None:
    plan = plan_run(load_config(CONFIG), on_gpu=False)
    needed = sum(part.number * part.total_mb for part in plan.parts)
    check_memory(plan, needed + 1)
    with pytest.raises(UserError, match=r"does not fit: all parts need [\d.]+ GB of"):
        check_memory(plan, needed - 1)


def test_preflight_refuses_a_large_model_that_this_machine_cannot_hold(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(CONFIG, [f"lm.model={folder}", "lm.device=cpu"])
    monkeypatch.setattr("lm.model.LARGE", 10_000)
    check_memory_here(config)
    monkeypatch.setattr("cluster.run.plan.device_memory_bytes", lambda device: 2**20)
    with pytest.raises(UserError, match="does not fit: all parts need"):
        check_memory_here(config)
    monkeypatch.setattr("lm.model.LARGE", 10**9)
    check_memory_here(config)  # a small one is not counted


def test_devices_by_name_and_size() -> None:
    assert (
        device_memory_mb("24GB") == device_memory_mb("24g") == device_memory_mb("l4") == 24 * 1024
    )
    with pytest.raises(UserError, match=r"--gpu 'potato': give a size such as 24GB"):
        device_memory_mb("potato")


def test_a_dry_run_checks_everything_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "tasks/toy.toml", "--run", "mine", "--local", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "fits this machine" in said and "nothing was started" in said
    assert main([*words, "learner.ranks=2"]) == 1  # what `train` would refuse
    assert "--local is one process" in capsys.readouterr().err
    monkeypatch.setattr("cluster.commands.plan.device_memory_bytes", lambda device: 2**20)
    assert main(words) == 1
    assert "does not fit" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
