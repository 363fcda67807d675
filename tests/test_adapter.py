"""The adapter as bytes, as a PEFT folder, and merged into the base."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lm.actions import ActionSpace
from lm.adapter import (
    AdapterMismatch,
    adapter_bytes,
    checksum,
    decode_adapter,
    load_adapter,
    load_adapter_bytes,
    read_adapter,
    save_adapter,
    unpack_adapter,
)
from lm.config import LoRAConfig
from lm.merged import MergedModel
from lm.model import LanguageModel, attach_adapter, freeze
from lm.sampling import Request, Sampler
from lm.scoring import completion_log_probs
from lm.weight_files import fingerprint
from tests.tiny_lm import ARCHITECTURES

IDS = torch.arange(14)[None]
LORA = LoRAConfig(rank=3, alpha=12.0)


@pytest.fixture
def base(tiny_lm: Callable[[str], PreTrainedModel]) -> Callable[[str], LanguageModel]:
    """Like load_base, without a tokenizer: nothing here reads text."""

    def build(architecture: str) -> LanguageModel:
        model = tiny_lm(architecture)
        freeze(model)
        return LanguageModel(
            model=model, tokenizer=PreTrainedTokenizerFast, fingerprint=fingerprint(model)
        )

    return build


def trained(language_model: LanguageModel, seed: int, config: LoRAConfig = LORA) -> PeftModel:
    """An adapter far from the identity."""
    model = attach_adapter(language_model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_carry_the_adapter_to_another_process(
    base: Callable[[str], LanguageModel], architecture: str
) -> None:
    source, target = trained(base(architecture), 1), trained(base(architecture), 2)
    assert (logits(source) - logits(target)).abs().max() > 1e-2
    data = adapter_bytes(source)
    load_adapter_bytes(target, data)
    assert torch.equal(logits(source), logits(target))
    assert adapter_bytes(target) == data
    assert all("lora_" in name and t.dtype == torch.float32 for name, t in load(data).items())


def test_the_checksum_notices_one_changed_byte(base: Callable[[str], LanguageModel]) -> None:
    data = adapter_bytes(trained(base("llama"), 1))
    assert checksum(data) == checksum(bytes(data))
    assert checksum(data) != checksum(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_adapter_is_read_by_plain_peft(
    base: Callable[[str], LanguageModel],
    tiny_lm: Callable[[str], PreTrainedModel],
    tmp_path: Path,
    architecture: str,
) -> None:
    language_model = base(architecture)
    model = trained(language_model, 1)
    save_adapter(model, tmp_path / "adapter", language_model.fingerprint)
    plain = PeftModel.from_pretrained(tiny_lm(architecture), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), logits(model))
    ours = load_adapter(base(architecture), tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model))
    assert any(parameter.requires_grad for parameter in ours.parameters())
    unpack_adapter(adapter_bytes(model), tmp_path / "unpacked")
    unpacked = PeftModel.from_pretrained(tiny_lm(architecture), tmp_path / "unpacked").eval()
    assert torch.equal(logits(unpacked), logits(model))


def test_saving_over_an_older_adapter_replaces_it(
    base: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    first, second = trained(base("llama"), 1), trained(base("llama"), 2)
    save_adapter(first, tmp_path, "f")
    save_adapter(second, tmp_path, "f")
    assert (
        load_file(tmp_path / "adapter_model.safetensors").keys()
        == load(adapter_bytes(second)).keys()
    )
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter_bytes(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_fingerprint.txt",
    ]


def test_an_adapter_of_another_base_is_refused_by_name(
    base: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    language_model = base("llama")
    model = trained(language_model, 1)
    save_adapter(model, tmp_path, language_model.fingerprint)
    other = base("llama")
    with torch.no_grad():
        other.model.lm_head.weight[2, 2] += 1.0
    changed = LanguageModel(
        model=other.model, tokenizer=other.tokenizer, fingerprint=fingerprint(other.model)
    )
    with pytest.raises(AdapterMismatch) as caught:
        load_adapter(changed, tmp_path)
    assert language_model.fingerprint in str(caught.value)
    assert changed.fingerprint in str(caught.value)


def test_a_foreign_adapter_without_fingerprint_is_compared_by_its_layers(
    base: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    save_adapter(trained(base("llama"), 1), tmp_path, "f")
    (tmp_path / "base_fingerprint.txt").unlink()
    load_adapter(base("llama"), tmp_path)
    with pytest.raises(AdapterMismatch, match="does not fit this base"):
        load_adapter(base("gpt2"), tmp_path)


def test_bytes_are_read_as_they_lie_on_disk_without_a_base(
    base: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    language_model = base("llama")
    save_adapter(trained(language_model, 1), tmp_path, language_model.fingerprint)
    data = read_adapter(tmp_path, language_model.fingerprint)
    assert data == (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterMismatch, match="was trained on base"):
        read_adapter(tmp_path, "another")
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"r": 4'))
    with pytest.raises(AdapterMismatch, match=r"weights have rank 3.*says rank 4"):
        read_adapter(tmp_path, language_model.fingerprint)


def foreign(model: PreTrainedModel, folder: Path, **settings: Any) -> None:
    """An adapter far from the identity, as somebody else's program makes it with plain peft."""
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
    adapted = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"o_proj": 16},
            "use_rslora": True,
            "layers_to_transform": [0],
        },
        {"target_modules": r".*\.[qv]_proj", "lora_dropout": 0.5, "init_lora_weights": "gaussian"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ],
)
def test_an_adapter_made_elsewhere_gives_the_logits_of_plain_peft(
    base: Callable[[str], LanguageModel],
    tiny_lm: Callable[[str], PreTrainedModel],
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    foreign(tiny_lm("llama"), tmp_path, **settings)
    plain = PeftModel.from_pretrained(tiny_lm("llama"), tmp_path).eval()
    assert (logits(plain) - logits(tiny_lm("llama"))).abs().max() > 1e-2
    beside = load_adapter(base("llama"), tmp_path)
    torch.testing.assert_close(logits(beside), logits(plain))
    merged = MergedModel(base("llama"))
    merged.load(read_adapter(tmp_path, "unknown"))
    torch.testing.assert_close(logits(merged.model), logits(plain), rtol=1e-4, atol=1e-5)
    merged.load(adapter_bytes(beside))
    torch.testing.assert_close(logits(merged.model), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = [1, 2]"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
)
def test_an_adapter_that_is_more_than_its_matrices_is_refused_by_the_setting(
    base: Callable[[str], LanguageModel],
    tiny_lm: Callable[[str], PreTrainedModel],
    tmp_path: Path,
    settings: dict[str, Any],
    named: str,
) -> None:
    foreign(tiny_lm("llama"), tmp_path, **{"target_modules": ["q_proj"]} | settings)
    with pytest.raises(AdapterMismatch, match=re.escape(named)):
        read_adapter(tmp_path, "unknown")
    with pytest.raises(AdapterMismatch, match=re.escape(named)):
        load_adapter(base("llama"), tmp_path)


def test_damaged_and_other_kinds_of_adapters_end_in_one_sentence(
    tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    foreign(tiny_lm("llama"), tmp_path, target_modules=["q_proj"])
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for damaged in (b"", whole[:-5], b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(damaged)
        with pytest.raises(AdapterMismatch, match=r"adapter_model\.safetensors is damaged"):
            read_adapter(tmp_path, "unknown")
    weights.write_bytes(whole)
    for broken in ("{", "[]", text.replace("LORA", "IA3"), text.replace('"r": 4', '"r": "four"')):
        config.write_text(broken)
        with pytest.raises(AdapterMismatch, match="adapter"):
            read_adapter(tmp_path, "unknown")


def test_a_folder_without_adapter_says_what_is_missing(
    base: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(base("llama"), tmp_path)


def test_bytes_for_another_rank_target_or_shape_are_refused_and_change_nothing(
    base: Callable[[str], LanguageModel],
) -> None:
    model = trained(base("llama"), 1)
    before = adapter_bytes(model)
    rank = adapter_bytes(trained(base("llama"), 2, LoRAConfig(rank=2, alpha=12.0)))
    with pytest.raises(AdapterMismatch, match=r"rank 2, alpha 12\.0.*expects rank 3"):
        load_adapter_bytes(model, rank)
    targets = LoRAConfig(rank=3, alpha=12.0, targets=("q_proj",))
    with pytest.raises(AdapterMismatch, match=r"different layers.*down_proj"):
        load_adapter_bytes(model, adapter_bytes(trained(base("llama"), 2, targets)))
    tensors = load(before)
    name = max(tensors)
    tensors[name] = tensors[name][:-1].contiguous()
    header = {"lora": '{"alpha": 12.0, "rank": 3}'}
    with pytest.raises(AdapterMismatch, match=r"has shape .* expects"):
        load_adapter_bytes(model, save(tensors, metadata=header))
    for garbage in (b"", b"12345678", before[:-3], save(tensors)):
        with pytest.raises(AdapterMismatch, match="no adapter blob"):
            load_adapter_bytes(model, garbage)
    assert adapter_bytes(model) == before
    copy = pickle.loads(pickle.dumps(AdapterMismatch("other base")))
    assert (type(copy), str(copy)) == (AdapterMismatch, "other base")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_sampler_records_what_the_unmerged_learner_recomputes(
    base: Callable[[str], LanguageModel], architecture: str
) -> None:
    learner = trained(base(architecture), 1)
    merged = MergedModel(base(architecture))
    merged.load(adapter_bytes(learner))
    actions = ActionSpace(stop_token=1, legal_tokens=None, min_len=1, max_len=8)
    requests = [Request(prompt=(5, 6, 7 + i % 4)) for i in range(24)]
    sampler = Sampler(merged.model, actions, None, max_rows=8)
    completions = sampler.sample(requests, torch.Generator().manual_seed(0))
    scored = completion_log_probs(
        learner,
        actions,
        [request.prompt for request in requests],
        [c.tokens.tolist() for c in completions],
        [c.from_tool.tolist() for c in completions],
    )
    for b, c in enumerate(completions):
        recorded = torch.from_numpy(c.log_q_token)
        recomputed = scored.log_pf_BT[b, : len(c.tokens)]
        torch.testing.assert_close(recomputed, recorded, rtol=0, atol=1e-4)
        stops = scored.log_stop_BS[b, torch.from_numpy(c.stops).long()]
        torch.testing.assert_close(stops, torch.from_numpy(c.log_q_stop), rtol=0, atol=1e-4)


def test_an_adapter_on_a_tied_head_leaves_the_embedding_as_it_is(
    base: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    tied = base("gpt2")
    assert tied.model.get_input_embeddings().weight is tied.model.get_output_embeddings().weight
    learner = trained(base("gpt2"), 1, LoRAConfig(rank=3, alpha=12.0, targets=("lm_head",)))
    merged = MergedModel(tied)
    merged.load(adapter_bytes(learner))
    assert (logits(learner) - logits(base("gpt2").model)).abs().max() > 0.1
    torch.testing.assert_close(logits(merged.model), logits(learner))
    merged.model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(learner)
    )


def test_merging_many_versions_does_not_drift(base: Callable[[str], LanguageModel]) -> None:
    versions = [adapter_bytes(trained(base("gpt2"), seed)) for seed in range(4)]
    once, often = MergedModel(base("gpt2")), MergedModel(base("gpt2"))
    once.load(versions[0])
    for step in range(40):
        often.load(versions[step % 4])
    often.load(versions[0])
    assert torch.equal(logits(once.model), logits(often.model))


def test_a_merged_model_drops_the_layers_that_a_new_adapter_leaves_alone(
    base: Callable[[str], LanguageModel],
) -> None:
    merged, fresh = MergedModel(base("llama")), MergedModel(base("llama"))
    narrow = adapter_bytes(
        trained(base("llama"), 2, LoRAConfig(rank=2, alpha=2.0, targets=("q_proj",)))
    )
    merged.load(adapter_bytes(trained(base("llama"), 1)))
    merged.load(narrow)
    fresh.load(narrow)
    assert torch.equal(logits(merged.model), logits(fresh.model))


def test_merging_refuses_an_adapter_of_another_architecture_and_changes_nothing(
    base: Callable[[str], LanguageModel],
) -> None:
    merged = MergedModel(base("gpt2"))
    before = logits(merged.model)
    with pytest.raises(AdapterMismatch, match="this base model has not"):
        merged.load(adapter_bytes(trained(base("llama"), 1)))
    assert torch.equal(logits(merged.model), before)


def test_an_adapter_may_travel_in_half_the_bytes(base: Callable[[str], LanguageModel]) -> None:
    model = trained(base("llama"), 1)
    whole, half = decode_adapter(adapter_bytes(model)), adapter_bytes(model, torch.bfloat16)
    assert len(half) < 0.7 * len(adapter_bytes(model))
    for name, tensor in decode_adapter(half).tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole.tensors[name].bfloat16().float())
    load_adapter_bytes(model, half)
    assert adapter_bytes(model, torch.bfloat16) == half
    merged = MergedModel(base("llama"))
    merged.load(half)
    torch.testing.assert_close(logits(merged.model), logits(model), rtol=0, atol=1e-4)
