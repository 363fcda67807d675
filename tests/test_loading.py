"""What of a base is loaded where: whole, in shards, or nothing of its weights at all."""

import json
import os
import pickle
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import LlamaConfig, PreTrainedModel

from cluster.config.file import load_config
from cluster.config.placement import Placement
from cluster.distributed.launcher import process_environment
from cluster.distributed.worker import Member, Worker
from cluster.run.identity import identity_of_run
from cluster.run.preflight import check_model_and_data
from lm.config import LMConfig, LoRAConfig
from lm.hub import ModelUnusable, load_model_config, load_tokenizer
from lm.merged import check_adaptable
from lm.model import inspect_base, load_base, load_shard
from lm.weight_files import weight_files
from tests.families import tiny_model
from tests.light_run import context
from tests.tiny_lm import ARCHITECTURES, VOCAB_SIZE, save_model, tiny_config

SUMS = "tasks/arithmetic.toml"


@pytest.fixture
def folder(tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path) -> Path:
    return Path(save_model(tiny_lm("llama"), tmp_path / "llama"))


@contextmanager
def parameters_held() -> Iterator[list[int]]:
    """How many parameters with numbers are alive, each time that a module is given another one."""
    given: list[weakref.ref[nn.Parameter]] = []
    held: list[int] = []

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            held.append(1 + sum(earlier() is not None for earlier in given))
            given.append(weakref.ref(parameter))

    handle = register_module_parameter_registration_hook(count)
    try:
        yield held
    finally:
        handle.remove()
    held.append(sum(earlier() is not None for earlier in given))


def test_preflight_looks_at_each_tensor_of_the_base_and_holds_none() -> None:
    config = load_config(SUMS)
    with parameters_held() as held:
        identity = check_model_and_data(config)
    # One of the base; of an adapter A and B, which peft makes before it moves them.
    assert len(held) > 20 and max(held) <= 2 and held[-1] == 0
    base = load_base(config.lm)
    assert identity["base"] == base.fingerprint
    with parameters_held() as held:
        load_base(config.lm)
    assert max(held) > 20, "the test counts what a whole base holds"


@pytest.mark.parametrize("family", [*ARCHITECTURES, "mixtral", "gpt_oss", "gemma3"])
def test_a_base_without_weights_is_the_one_that_is_loaded(
    tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path, family: str
) -> None:
    """Of fused experts too, which lie in other tensors than the model has."""
    model = tiny_lm(family) if family in ARCHITECTURES else tiny_model(family)
    config = LMConfig(model=save_model(model, tmp_path), device="cpu")
    whole, looked_at = load_base(config), inspect_base(config)
    assert looked_at.fingerprint == whole.fingerprint
    assert all(parameter.is_meta for parameter in looked_at.model.parameters())
    halved = config.model_copy(update={"dtype": "bfloat16"})
    found = {inspect_base(halved).fingerprint, load_base(halved).fingerprint}
    assert found == {whole.fingerprint}, "one base, whatever the dtype"
    check_adaptable(looked_at, LoRAConfig(rank=2))
    assert not any("lora" in name for name, _ in looked_at.model.named_modules())


def test_an_adapter_is_tried_without_weights_too(tmp_path: Path) -> None:
    config = LMConfig(model=save_model(tiny_model("deepseek_v2"), tmp_path, words=30))
    with pytest.raises(ModelUnusable, match=r"'auto' on a DeepseekV2.*experts.*'attention'"):
        check_adaptable(inspect_base(config), LoRAConfig(rank=2))
    with pytest.raises(ModelUnusable, match="'nothing' names no linear layer"):
        check_adaptable(inspect_base(config), LoRAConfig(targets=("nothing",)))


def test_files_that_do_not_fit_the_model_are_named_in_one_sentence(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.7.extra.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    weights["model.norm.weight"] = torch.ones(5)
    save_file(weights, file, metadata={"format": "pt"})
    expected = (
        r"1 weights are not in its files, among them model\.layers\.1\.mlp\.up_proj\.weight; "
        r"1 weights have another shape there, among them model\.norm\.weight \[5\], not \[32\]; "
        r"1 weights belong nowhere, among them model\.layers\.7\.extra\.weight; .*belong together"
    )
    for load in (load_base, inspect_base):
        with pytest.raises(ModelUnusable, match=expected):
            load(LMConfig(model=str(folder), device="cpu"))


def test_weights_in_another_format_are_looked_at_too(folder: Path) -> None:
    file, config = folder / "model.safetensors", LMConfig(model=str(folder), device="cpu")
    first = load_base(config).fingerprint
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    assert weight_files(config) == []
    with parameters_held() as held:
        assert inspect_base(config).fingerprint == first
    assert max(held) == 1


@pytest.mark.parametrize("load", [load_base, inspect_base])
def test_a_file_that_is_cut_off_is_named(folder: Path, load: Callable[[LMConfig], Any]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelUnusable, match=r"the weights: .*damaged or cut off: fetch .* again"):
        load(LMConfig(model=str(folder)))


def test_a_shard_is_what_is_kept_of_each_tensor(
    tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Of files in pieces; tied weights are read once, and stay one parameter."""
    model = tiny_lm("gpt2")
    save_model(model, tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "model.safetensors").unlink()
    config = LMConfig(model=str(tmp_path), device="cpu")
    files = weight_files(config)
    assert len(files) > 2
    kept: list[torch.Size] = []

    def first_row(parameter: nn.Parameter) -> nn.Parameter:
        kept.append(parameter.shape)
        return nn.Parameter(parameter[:1].clone(), requires_grad=False)

    shard = load_shard(config, files, first_row)
    own = dict(shard.named_parameters())
    assert len(kept) == len(own) == len(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        assert torch.equal(own[name], parameter[:1])
    assert shard.get_output_embeddings().weight is shard.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "a method that it does not name"),
        ({"quant_method": "gptq", "bits": 4, "dataset": "c4"}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_a_quantised_base_is_refused_by_its_configuration_alone(
    folder: Path, settings: dict[str, Any], named: str
) -> None:
    (folder / "model.safetensors").unlink()
    declared = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(declared | {"quantization_config": settings}))
    for load in (load_model_config, load_base, inspect_base):
        with pytest.raises(ModelUnusable, match=rf"is quantised \({named}, .*made from, with"):
            load(LMConfig(model=str(folder), device="cpu"))


def test_a_revision_names_tokenizer_configuration_and_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    older = tmp_path / "older"
    small = type(tiny_config("llama"))(**tiny_config("llama").to_dict() | {"num_hidden_layers": 1})
    save_model(transformers.AutoModelForCausalLM.from_config(small), older, words=9)
    kept = hub / "models--some--body"
    (kept / "refs").mkdir(parents=True)
    for name, source, commit in (("main", folder, "a" * 40), ("v1", older, "b" * 40)):
        (kept / "refs" / name).write_text(commit)
        shutil.copytree(source, kept / "snapshots" / commit)

    newest = LMConfig(model="some/body", device="cpu")
    first = newest.model_copy(update={"revision": "v1"})
    for config, layers, words in ((newest, 2, VOCAB_SIZE - 1), (first, 1, 9)):
        assert load_model_config(config).num_hidden_layers == layers
        assert len(load_tokenizer(config)) == words
        whole = load_base(config)
        assert len(whole.model.model.layers) == layers and len(whole.tokenizer) == words
        assert inspect_base(config).fingerprint == whole.fingerprint
        assert weight_files(config)[0].startswith(str(kept))
        assert inspect_base(config, fetch=False).fingerprint == whole.fingerprint

    # A driver whose workers are elsewhere fetches no weights.
    (kept / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
    looked_at = inspect_base(first, fetch=False)
    assert looked_at.fingerprint == "" and len(looked_at.tokenizer) == 9
    assert all(parameter.is_meta for parameter in looked_at.model.parameters())
    check_adaptable(looked_at, LoRAConfig(rank=2))
    with pytest.raises(ModelUnusable, match="the weights"):
        inspect_base(newest.model_copy(update={"model": str(kept / "snapshots" / ("b" * 40))}))

    run = load_config(SUMS)
    later = load_config(SUMS, ["lm.revision=v1", "lm.trust_remote_code=true"])
    assert identity_of_run(run, {})["lm.revision"] is None
    assert identity_of_run(later, {})["lm.revision"] == "v1"
    assert "lm.trust_remote_code" not in identity_of_run(later, {}), "older runs go on"


def test_code_beside_a_model_is_run_where_that_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    (folder / "theirs.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class TheirConfig(LlamaConfig):\n    model_type = 'theirs'\n"
        "class TheirModel(LlamaForCausalLM):\n    config_class = TheirConfig\n"
    )
    declared = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    declared |= {"model_type": "theirs", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(declared))
    config = LMConfig(model=str(folder), device="cpu")
    for load in (load_base, inspect_base):
        with pytest.raises(ModelUnusable, match=r"set lm\.trust_remote_code = true if you trust"):
            load(config)
    trusting = config.model_copy(update={"trust_remote_code": True})
    whole, looked_at = load_base(trusting), inspect_base(trusting)
    for base in (whole, looked_at):
        assert type(base.model).__name__ == "TheirModel"
        assert isinstance(base.model.config, LlamaConfig)
    assert whole.fingerprint == looked_at.fingerprint


def test_workers_see_the_hub_as_the_driver_does_and_the_token_shows_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = "hf_abcdefghijkl"
    seen = {"HF_HOME": "/models", "HF_ENDPOINT": "https://mirror", "HF_HUB_OFFLINE": "1"}
    for name, value in (seen | {"HF_TOKEN": token}).items():
        monkeypatch.setenv(name, value)
    told = process_environment(Placement(threads=2))
    assert told.items() >= seen.items() and token not in repr(told)  # Ray logs and shows it
    sent = context(load_config("tasks/toy.toml"), None)
    assert token not in repr(sent)
    travelled = pickle.loads(pickle.dumps(sent))
    monkeypatch.delenv("HF_TOKEN")
    assert Worker(travelled, Member(name="actor-0")) and travelled.hub_token == token
    assert os.environ["HF_TOKEN"] == token
    monkeypatch.setenv("HF_TOKEN", "")
    for name in seen:
        monkeypatch.delenv(name)
    assert not process_environment(Placement(threads=2)).keys() & seen.keys()
