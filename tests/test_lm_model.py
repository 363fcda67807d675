"""Loading a base model: what comes back, and what is said when it cannot be loaded."""

import copy
import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
)
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm.adapter import adapter_bytes
from lm.attention import attention_mask
from lm.config import LMConfig, LoRAConfig
from lm.hub import ModelNotFound, ModelUnusable, ask_hub, load_model_config, load_tokenizer
from lm.merged import MergedModel, check_adaptable
from lm.model import (
    LanguageModel,
    adapted_layers,
    attach_adapter,
    context_limit,
    load_base,
    recompute_activations,
    vocab_size,
)
from reward.probe import probe
from tests.families import tiny_model
from tests.tiny_lm import ARCHITECTURES, VOCAB_SIZE, save_model

IDS = torch.arange(14)[None]


@pytest.fixture
def folder(tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path) -> Path:
    return Path(save_model(tiny_lm("llama"), tmp_path / "llama"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_frozen_with_its_weights(
    tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path, architecture: str
) -> None:
    saved = tiny_lm(architecture)
    loaded = load_base(LMConfig(model=save_model(saved, tmp_path / "m"), device="cpu"))
    # Qwen2's tokenizer class adds an end-of-text token of its own to the thirty words.
    assert len(loaded.tokenizer) in (VOCAB_SIZE - 1, VOCAB_SIZE)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, saved(ids).logits)


def test_dropout_stays_off_even_when_something_calls_train(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert config.attn_pdrop > 0
    path = save_model(GPT2LMHeadModel(config), tmp_path / "m")
    model = load_base(LMConfig(model=path, device="cpu")).model.train()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_the_fingerprint_names_the_weights_not_the_folder_or_the_dtype(
    tiny_lm: Callable[[str], PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    first = load_base(LMConfig(model=str(folder), device="cpu"))
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load_base(LMConfig(model=str(moved), device="cpu")).fingerprint == first.fingerprint
    halved = load_base(LMConfig(model=str(folder), device="cpu", dtype="bfloat16"))
    assert next(halved.model.parameters()).dtype == torch.bfloat16
    assert halved.fingerprint == first.fingerprint

    trained = tiny_lm("llama")
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    other = load_base(LMConfig(model=save_model(trained, tmp_path / "trained"), device="cpu"))
    assert other.fingerprint != first.fingerprint


def test_the_kernel_of_attention_is_the_one_asked_for(folder: Path) -> None:
    plain = LMConfig(model=str(folder), device="cpu")
    bases = {
        kernel: load_base(plain.model_copy(update={"attention": kernel}))
        for kernel in ("auto", "sdpa", "eager")
    }
    kernels = {name: base.model.config._attn_implementation for name, base in bases.items()}
    assert kernels == {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager"}
    assert len({base.fingerprint for base in bases.values()}) == 1
    for base in bases.values():
        probe(base.model, "tiny")


@pytest.mark.parametrize("queries", [6, 1])
@pytest.mark.parametrize("copies", [False, True])
def test_heads_that_share_keys_attend_as_transformers_lets_them_without_its_copies(
    tiny_lm: Callable[[str], PreTrainedModel],
    copies: bool,
    queries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_lm("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    ids_RQ = torch.arange(12).view(2, 6)
    sees_RQK = torch.ones(2, 6, 6).tril().bool()
    sees_RQK[1, :, 2] = False
    sees_RQK[1, 2, 2] = True
    position_RQ = torch.arange(6).expand(2, 6)
    mask: Any = attention_mask(model, sees_RQK, position_RQ, position_RQ)
    with torch.no_grad():
        read = (
            model(
                input_ids=ids_RQ[:, : 6 - queries],
                attention_mask=mask[:, :, : 6 - queries, : 6 - queries],
            ).past_key_values
            if queries < 6
            else None
        )

    def logits(kernel: Any, **inputs: Any) -> torch.Tensor:
        AttentionInterface.register("sdpa", kernel)
        cache = copy.deepcopy(read)
        new = mask[:, :, -queries:]
        return model(attention_mask=new, past_key_values=cache, **inputs).logits

    with torch.set_grad_enabled(copies):  # with gradients transformers' own is the faster one
        monkeypatch.setattr(
            sdpa_attention, "repeat_kv", spy := Mock(wraps=sdpa_attention.repeat_kv)
        )
        ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids_RQ[:, -queries:])}
        mine = logits(ours, **inputs)
        assert spy.called == copies
        try:
            theirs = logits(sdpa_attention.sdpa_attention_forward, **inputs)
        finally:
            AttentionInterface.register("sdpa", ours)
    assert spy.called
    assert mine.shape[1] == queries and torch.equal(mine, theirs)


def test_a_bias_of_positions_is_left_to_transformers() -> None:
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    query, key, value = (torch.randn(1, heads, 3, 4) for heads in (4, 2, 2))
    mask, bias = torch.zeros(1, 1, 3, 3), torch.randn(1, 4, 3, 3)
    inputs = (module, query, key, value, mask)
    mine, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*inputs, position_bias=bias)
    theirs, _ = sdpa_attention.sdpa_attention_forward(*inputs, position_bias=bias)
    assert torch.equal(mine, theirs)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="the package is installed")
def test_a_kernel_that_is_not_installed_is_named(folder: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"FlashAttention2.*; install what it names"):
        load_base(LMConfig(model=str(folder), device="cpu", attention="flash_attention_2"))
    with pytest.raises(ValidationError, match="leave probe on"):
        LMConfig(model=str(folder), attention="flash_attention_2", probe=False)


def test_tokenizer_and_architecture_are_read_without_the_weights(folder: Path) -> None:
    config = LMConfig(model=str(folder), device="cpu")
    base = load_base(config)
    whole = base.tokenizer
    (folder / "model.safetensors").unlink()
    alone = load_tokenizer(config)
    assert alone.get_vocab() == whole.get_vocab()
    architecture = load_model_config(config)
    assert vocab_size(architecture) == vocab_size(base.model) == VOCAB_SIZE
    assert context_limit(architecture) == context_limit(base.model)
    (folder / "tokenizer.json").write_text("no tokenizer")
    with pytest.raises(ModelUnusable, match="cannot load the tokenizer"):
        load_tokenizer(config)


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        load_base(LMConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(FileNotFoundError, match=r"\./nothing"):
        load_base(LMConfig(model="./nothing"))


def test_an_unknown_hub_id_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"nobody/nothing-of-that-name.*check the name, or"):
        load_base(LMConfig(model="nobody/nothing-of-that-name"))


def test_a_hub_that_is_silent_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    slept, ours, sleep = list[float](), threading.get_ident(), time.sleep

    def note(seconds: float) -> None:  # `time` is everybody's: threads of other tests sleep on
        (slept.append if threading.get_ident() == ours else sleep)(seconds)

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", note)
    for load in (load_model_config, load_tokenizer):
        with pytest.raises(
            ModelNotFound, match=r"the hub \(http://127\.0\.0\.1:9\) is not reached"
        ):
            load(LMConfig(model="nobody/nothing-of-that-name"))
    assert slept == [], "the library waits before it asks again"


@pytest.mark.parametrize(
    ("timeouts", "model", "offline"),
    [(1, "some/kept", False), (2, "some/kept", True), (2, "some/other", False)],
)
def test_a_slow_hub_is_given_up_only_for_what_the_cache_holds(
    timeouts: int, model: str, offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([TimeoutError] * timeouts + [None])

    def head(endpoint: str, *, timeout: float) -> None:
        if (error := next(answers)) is not None:
            raise error(f"{endpoint}: no answer within {timeout} s")

    monkeypatch.setattr("lm.hub.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{tmp_path.name}")
    kept = tmp_path / "models--some--kept"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "v1").write_text("a" * 40)
    (kept / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (kept / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    ask_hub(model, "v1")
    assert constants.HF_HUB_OFFLINE is offline


def test_a_folder_that_is_no_model_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnusable, match=r"holds no config\.json"):
        load_base(LMConfig(model=str(tmp_path / "empty")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ModelUnusable, match="has no tokenizer"):
        load_base(LMConfig(model=str(folder)))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("hello")
    with pytest.raises(ModelUnusable, match="is no model folder"):
        load_base(LMConfig(model=str(tmp_path / "model.txt")))


def test_a_broken_config_or_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    unweighted = Path(shutil.copytree(folder, tmp_path / "unweighted"))
    (unweighted / "model.safetensors").unlink()
    with pytest.raises(ModelUnusable, match="the weights"):
        load_base(LMConfig(model=str(unweighted)))
    (folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ModelUnusable, match=r"config\.json"):
        load_base(LMConfig(model=str(folder)))


def test_damaged_and_missing_files_end_in_one_sentence(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelUnusable, match=r"the weights: .*damaged or cut off: fetch .* again"):
        load_base(LMConfig(model=str(folder)))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelUnusable, match=r"model\.safetensors is a pointer of git-lfs"):
        load_base(LMConfig(model=str(folder)))
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "gptq", "bits": 4, "dataset": "c4", "group_size": 8}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(ModelUnusable, match=r"is quantised \(gptq, .*; take the model that"):
        load_base(LMConfig(model=str(folder)))


def test_an_encoder_and_decoder_is_no_base(folder: Path) -> None:
    T5Config().save_pretrained(folder)
    with pytest.raises(ModelUnusable, match=r"\(t5\) is an encoder and a decoder"):
        load_base(LMConfig(model=str(folder)))


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_adapter_leaves_fused_experts_alone_and_can_be_merged(family: str) -> None:
    """Peft's own idea of all linear layers has them in, and nothing else could read that."""
    base = LanguageModel(model=tiny_model(family), tokenizer=None, fingerprint="f")
    check_adaptable(base, LoRAConfig(rank=2))
    adapted = attach_adapter(base, LoRAConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    merged = MergedModel(LanguageModel(model=tiny_model(family), tokenizer=None, fingerprint="f"))
    before = merged.model(IDS).logits
    merged.load(adapter_bytes(adapted))
    assert (merged.model(IDS).logits - before).abs().max() > 1e-2
    torch.testing.assert_close(merged.model(IDS).logits, adapted(IDS).logits, rtol=0, atol=2e-3)


def test_an_adapter_that_nothing_could_read_back_is_refused_before_it_is_trained() -> None:
    base = LanguageModel(model=tiny_model("deepseek_v2"), tokenizer=None, fingerprint="f")
    said = (
        r"lora\.targets = .* on a DeepseekV2ForCausalLM .*\(.*fused.*\): take 'attention', or name"
    )
    with pytest.raises(ModelUnusable, match=said):
        check_adaptable(base, LoRAConfig(rank=2))
    base = LanguageModel(model=tiny_model("deepseek_v2"), tokenizer=None, fingerprint="f")
    with pytest.raises(ModelUnusable, match=said):
        check_adaptable(base, LoRAConfig(rank=2, targets=("up_proj",)))
    base = LanguageModel(model=tiny_model("deepseek_v2"), tokenizer=None, fingerprint="f")
    names = [name for name, _ in base.model.named_modules()]
    check_adaptable(base, LoRAConfig(rank=2, targets="attention"))
    assert [name for name, _ in base.model.named_modules()] == names, "left as it was"


def test_of_a_model_that_sees_only_what_reads_text_is_adapted() -> None:
    model = tiny_model("gemma3")
    assert (vocab_size(model), context_limit(model)) == (61, 96)
    for targets in ("auto", "attention"):
        layers = adapted_layers(model, LoRAConfig(targets=targets))
        assert layers and all(".language_model." in f".{name}" for name in layers)
        assert not any("vision" in name or name.endswith("lm_head") for name in layers)
    check_adaptable(LanguageModel(model=model, tokenizer=None, fingerprint="f"), LoRAConfig())


def test_weights_that_do_not_fill_the_model_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnusable, match=r"up_proj.*do not belong together"):
        load_base(LMConfig(model=str(folder)))


def test_a_tokenizer_larger_than_the_model_is_refused(
    tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    path = save_model(tiny_lm("llama"), tmp_path / "m", words=VOCAB_SIZE + 1)
    with pytest.raises(ModelUnusable, match="32 tokens, the model only 31"):
        load_base(LMConfig(model=path))


def test_errors_travel_between_processes() -> None:
    for error in (ModelNotFound("nothing here"), ModelUnusable("no tokenizer")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_is_the_identity_on_all_linear_layers_but_the_head(
    tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path, architecture: str
) -> None:
    base = load_base(LMConfig(model=save_model(tiny_lm(architecture), tmp_path), device="cpu"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = base.model(ids).logits
    model = attach_adapter(base, LoRAConfig(rank=3, alpha=6.0), seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trainable)
    layers = {name.split(".lora_")[0] for name in trainable}
    per_block = {"gpt2": 4, "llama": 7, "qwen2": 7, "gptj": 6, "gpt_neox": 4}[architecture]
    assert len(layers) == 2 * per_block
    assert not any("head" in layer or "embed" in layer for layer in layers)


def test_the_adapter_depends_on_its_seed_alone_and_leaves_the_global_generator(
    folder: Path,
) -> None:
    def drawn(seed: int) -> torch.Tensor:
        base = load_base(LMConfig(model=str(folder), device="cpu"))
        torch.manual_seed(torch.seed() % 2**31)
        before = torch.get_rng_state()
        model = attach_adapter(base, LoRAConfig(rank=2, alpha=2.0), seed)
        assert torch.equal(before, torch.get_rng_state())
        return next(p for n, p in model.named_parameters() if "lora_A" in n).detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_named_targets_are_the_only_ones_and_unknown_ones_are_refused(folder: Path) -> None:
    def base() -> LanguageModel:
        return load_base(LMConfig(model=str(folder), device="cpu"))

    model = attach_adapter(base(), LoRAConfig(rank=2, alpha=2.0, targets=("q_proj",)), seed=0)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all("q_proj" in name for name in trainable)
    with pytest.raises(ModelUnusable, match=r"'c_attn' names no linear layer.*q_proj"):
        attach_adapter(base(), LoRAConfig(rank=2, alpha=2.0, targets=("c_attn",)), seed=0)


def test_attention_is_found_by_whatever_name_it_has(
    tiny_lm: Callable[[str], PreTrainedModel], folder: Path
) -> None:
    def found(architecture: str) -> set[str]:
        layers = adapted_layers(tiny_lm(architecture), LoRAConfig(targets="attention"))
        return {layer.rpartition(".")[2] for layer in layers}

    assert found("llama") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert found("gptj") == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert found("gpt_neox") == {"query_key_value", "dense"}

    def adapted(targets: Any) -> dict[str, torch.Tensor]:
        base = load_base(LMConfig(model=str(folder), device="cpu"))
        model = attach_adapter(base, LoRAConfig(rank=2, alpha=2.0, targets=targets), seed=0)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    named, meant = adapted(("q_proj", "k_proj", "v_proj", "o_proj")), adapted("attention")
    assert named.keys() == meant.keys()
    assert all(torch.equal(named[name], meant[name]) for name in named)
    with pytest.raises(ModelUnusable, match=r"no part of a Sequential is called so.*\['0'\]"):
        adapted_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoRAConfig(targets="attention"))


def test_the_attention_of_gpt2_has_not_the_layer_of_its_mlp_that_is_called_alike(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    layers = adapted_layers(tiny_lm("gpt2"), LoRAConfig(targets="attention"))
    assert layers == [
        f"transformer.h.{block}.attn.{layer}" for block in (0, 1) for layer in ("c_attn", "c_proj")
    ]


def test_layers_around_an_attention_are_not_part_of_it() -> None:
    class SomeAttentionDecoderLayer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2)})
            self.mlp = torch.nn.Linear(2, 2)

    model = torch.nn.ModuleDict({"block": SomeAttentionDecoderLayer()})
    assert adapted_layers(model, LoRAConfig(targets="attention")) == ["block.self_attn.q"]


def test_config_refuses_unknown_keys_and_impossible_values() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        LMConfig(model="x", dtypo="float32")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="float32"):
        LMConfig(model="x", dtype="float16")
    with pytest.raises(ValidationError, match="greater than 0"):
        LoRAConfig(rank=0, alpha=1.0)


def test_shipping_format_is_plain_hugging_face(folder: Path) -> None:
    ours = load_base(LMConfig(model=str(folder), device="cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for ours_weight, weight in zip(ours.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours_weight, weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_activations_keep_less_and_give_the_same_gradient(
    tiny_lm: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    kept: list[int] = []
    gradients = []
    for recomputed in (False, True):
        base = LanguageModel(model=tiny_lm(architecture), tokenizer=None, fingerprint="")
        model = attach_adapter(base, LoRAConfig(rank=2), seed=0)
        if recomputed:
            recompute_activations(model)
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=torch.arange(2, 30)[None], use_cache=False).logits.sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert kept[1] < kept[0] / 5
    for mine, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_model_that_names_no_layers_cannot_recompute_them() -> None:
    with pytest.raises(ModelUnusable, match=r"learner\.checkpointing = false"):
        recompute_activations(torch.nn.Linear(2, 2))
