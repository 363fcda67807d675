"""The adapter as bytes, and as a folder in PEFT format.

On the wire an adapter is one safetensors blob: float32, or bfloat16 (`learner.publish_dtype`), the
names that peft itself writes into adapter_model.safetensors, and one metadata entry with rank and
alpha. Beside a saved adapter stands the fingerprint of the base it was trained on.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lm.model import LanguageModel

WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_FILE = "base_fingerprint.txt"
ADAPTER_NAME = "default"
# Settings of peft that an adapter's matrices and the scale of each layer take account of, or that
# change nothing in what is computed. With any other the adapter is more than its matrices.
UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "use_rslora", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
}


class AdapterMismatch(ValueError):
    """An adapter that is damaged, or of another base model or configuration."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """A decoded adapter."""

    tensors: dict[str, Tensor]  # peft's file names -> float32; A [rank, in], B [out, rank]
    rank: int
    alpha: float


def adapter_bytes(model: PeftModel, dtype: torch.dtype = torch.float32) -> bytes:
    """The LoRA weights of `model` as safetensors, nothing of the base."""
    return _encode(dict(_lora_parameters(model)), model.peft_config[ADAPTER_NAME], dtype)


def held_adapter(model: PeftModel) -> AdapterWeights:
    """The adapter of `model` as it stands there, which without weights is names and shapes."""
    lora = model.peft_config[ADAPTER_NAME]
    tensors: dict[str, Tensor] = {**_lora_parameters(model)}
    return AdapterWeights(tensors=tensors, rank=lora.r, alpha=float(lora.lora_alpha))


def decode_adapter(data: bytes) -> AdapterWeights:
    """Read what adapter_bytes wrote. Raises AdapterMismatch for anything else."""
    try:
        tensors = {name: tensor.float() for name, tensor in load(data).items()}
        shape = json.loads(_metadata(data)["lora"])
        return AdapterWeights(tensors=tensors, rank=int(shape["rank"]), alpha=float(shape["alpha"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterMismatch(f"{len(data)} bytes that are no adapter blob: {error}") from error


def load_adapter_bytes(model: PeftModel, data: bytes) -> None:
    """Copy the adapter in `data` into `model`, in place; all or nothing.

    Raises AdapterMismatch when names, shapes, rank or alpha differ, naming both sides.
    """
    adapter = decode_adapter(data)
    _require_scale(adapter, model.peft_config[ADAPTER_NAME], "adapter has", "the model expects")
    _copy(adapter.tensors, _lora_parameters(model))


def _require_scale(adapter: AdapterWeights, lora: LoraConfig, has: str, expects: str) -> None:
    if (adapter.rank, adapter.alpha) != (lora.r, float(lora.lora_alpha)):
        raise AdapterMismatch(
            f"{has} rank {adapter.rank}, alpha {adapter.alpha}; "
            f"{expects} rank {lora.r}, alpha {float(lora.lora_alpha)}"
        )


def checksum(data: bytes) -> str:
    """Hex digest that travels beside published adapter bytes, and lies beside what is saved."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what its base does; its parameters are left as they are.

    peft's own switch also turns `requires_grad` off and on, which an engine may watch.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    own = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield
    finally:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling.update(scaling)


def save_adapter(model: PeftModel, folder: Path, base_fingerprint: str) -> None:
    """Write `folder` so that plain `PeftModel.from_pretrained(base, folder)` reads it.

    The weights are renamed into place last: a reader sees an old adapter, a whole one, or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[ADAPTER_NAME].save_pretrained(str(folder))
    (folder / FINGERPRINT_FILE).write_text(base_fingerprint + "\n")
    partial = folder / f"{WEIGHTS_FILE}.partial"
    partial.write_bytes(adapter_bytes(model))
    os.replace(partial, folder / WEIGHTS_FILE)


def unpack_adapter(data: bytes, folder: Path) -> None:
    """Write the adapter in `data` as a new folder that peft, or vLLM, reads beside its base."""
    adapter = decode_adapter(data)
    layers = {name.rpartition(".lora_")[0] for name in adapter.tensors}
    lora = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(layer.removeprefix("base_model.model.") for layer in layers),
        task_type="CAUSAL_LM",
    )
    folder.mkdir(parents=True)
    lora.save_pretrained(str(folder))
    (folder / WEIGHTS_FILE).write_bytes(data)


def read_adapter(folder: Path, base_fingerprint: str) -> bytes:
    """The bytes that adapter_bytes gives of the adapter saved in `folder`, without its base.

    What save_adapter wrote is returned as it lies on disk. Of an adapter that plain peft wrote the
    scale of each layer (rsLoRA, rank_pattern, alpha_pattern) is folded into its B.

    Raises as load_adapter, but that layers and shapes show only when the bytes are loaded.
    """
    lora = _folder_config(folder, base_fingerprint)
    data = (folder / WEIGHTS_FILE).read_bytes()
    tensors = _folder_tensors(folder, data)
    if "lora" not in _metadata(data):
        return _encode(tensors, lora)
    has, expects = f"adapter {folder}: its weights have", "its adapter_config.json says"
    _require_scale(decode_adapter(data), lora, has, expects)
    return data


def load_adapter(language_model: LanguageModel, folder: Path) -> PeftModel:
    """Wrap the base, in place, with the adapter saved in `folder`; trainable, dropout off.

    An adapter that plain peft wrote has no fingerprint: then only names and shapes are compared.

    Raises:
        FileNotFoundError: `folder` holds no adapter.
        AdapterMismatch: it was trained on another base, its weights do not fit, or it is more than
            low-rank matrices beside linear layers.
    """
    lora = _folder_config(folder, language_model.fingerprint)
    lora.inference_mode = False
    lora.lora_dropout = 0.0
    tensors = _folder_tensors(folder, (folder / WEIGHTS_FILE).read_bytes())
    try:
        model = get_peft_model(language_model.model, lora)
    except ValueError as error:
        raise AdapterMismatch(f"adapter {folder} does not fit this base: {error}") from error
    _copy(tensors, _lora_parameters(model))
    return model


def _folder_config(folder: Path, base_fingerprint: str) -> LoraConfig:
    """The configuration of the adapter in `folder`, which belongs to the base and is plain LoRA."""
    for name in ("adapter_config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no adapter: {name} is missing; give a folder written by a run"
            )
    written = folder / FINGERPRINT_FILE
    trained_on = written.read_text().strip() if written.is_file() else ""
    if trained_on and base_fingerprint and trained_on != base_fingerprint:
        raise AdapterMismatch(
            f"adapter {folder} was trained on base {trained_on}, but the loaded "
            f"base is {base_fingerprint}; load the base model the adapter belongs to"
        )
    try:
        kind = json.loads((folder / "adapter_config.json").read_text()).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"peft_type is {kind!r}, and only LORA is read")
        lora = LoraConfig.from_pretrained(str(folder))
        if not isinstance(lora.r, int) or not isinstance(lora.lora_alpha, int | float):
            raise TypeError(f"r = {lora.r!r} and lora_alpha = {lora.lora_alpha!r} must be numbers")
    except (AttributeError, TypeError, ValueError) as error:
        raise AdapterMismatch(f"adapter {folder}: adapter_config.json: {error}") from error
    usual = LoraConfig()
    for name, value in vars(lora).items():
        plain = value == getattr(usual, name, value) or not value
        if name == "init_lora_weights":  # the others change the base
            plain = isinstance(value, bool) or value in ("gaussian", "orthogonal")
        if name not in UNDERSTOOD and not plain:
            raise AdapterMismatch(_not_plain(f"{folder} has {name} = {value!r}"))
    return lora


def _folder_tensors(folder: Path, data: bytes) -> dict[str, Tensor]:
    """The matrices in the weights file of `folder`, whose content is `data`."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise AdapterMismatch(
            f"{folder / WEIGHTS_FILE} is damaged or no safetensors file: {error}"
        ) from error
    for name, tensor in tensors.items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or tensor.dim() != 2:
            raise AdapterMismatch(_not_plain(f"{folder} holds {name} {tuple(tensor.shape)}"))
    return tensors


def _not_plain(what: str) -> str:
    return (
        f"adapter {what}, and only low-rank matrices beside linear layers are read: merge it into "
        "its base with peft (merge_and_unload) and give the merged folder as lm.model"
    )


def _metadata(data: bytes) -> dict[str, str]:
    """What the header of safetensors bytes says beside its tensors."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__") or {})


def _encode(
    tensors: dict[str, Tensor], lora: LoraConfig, dtype: torch.dtype = torch.float32
) -> bytes:
    """One blob whose every layer is scaled by alpha / rank."""
    shape = json.dumps({"alpha": float(lora.lora_alpha), "rank": lora.r}, sort_keys=True)
    plain = {n: t.detach().to("cpu", torch.float32).contiguous() for n, t in tensors.items()}
    if lora.use_rslora or lora.rank_pattern or lora.alpha_pattern:
        for name in (name for name in plain if name.endswith(".lora_B.weight")):
            rank = plain[name].shape[1]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            key = get_pattern_key(lora.alpha_pattern.keys(), layer)
            alpha = lora.alpha_pattern.get(key, lora.lora_alpha)
            scale = alpha / (rank**0.5 if lora.use_rslora else rank)
            plain[name] = plain[name] * (scale * lora.r / lora.lora_alpha)
    return save({n: t.to(dtype) for n, t in plain.items()}, metadata={"lora": shape})


def _lora_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """peft's file name -> parameter; the file leaves the adapter's name out."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def _copy(given: dict[str, Tensor], expected: dict[str, nn.Parameter]) -> None:
    if given.keys() != expected.keys():
        raise AdapterMismatch(
            f"adapter and model target different layers: only in the adapter "
            f"{sorted(given.keys() - expected.keys())[:3]}, only in the model "
            f"{sorted(expected.keys() - given.keys())[:3]}"
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise AdapterMismatch(
                f"adapter weight {name} has shape {tuple(tensor.shape)}, "
                f"the model expects {tuple(expected[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in given.items():
            expected[name].copy_(tensor)
