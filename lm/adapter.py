"""The adapter as bytes, and as a folder in PEFT format.

On the wire an adapter is one safetensors blob: float32, the names that peft itself writes into
adapter_model.safetensors, and one metadata entry with rank and alpha. The blob carries no base
weights. Beside a saved adapter stands the fingerprint of the base it was trained on.
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
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lm.model import LanguageModel

WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_FILE = "base_fingerprint.txt"
ADAPTER_NAME = "default"


class AdapterMismatch(ValueError):
    """An adapter that does not belong to this base model or to this configuration."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """A decoded adapter."""

    tensors: dict[str, Tensor]  # peft's file names -> float32; A [rank, in], B [out, rank]
    rank: int
    alpha: float


def adapter_bytes(model: PeftModel) -> bytes:
    """The LoRA weights of `model` as safetensors: float32, nothing of the base."""
    lora = model.peft_config[ADAPTER_NAME]
    shape = json.dumps({"alpha": float(lora.lora_alpha), "rank": lora.r}, sort_keys=True)
    tensors = {
        name: parameter.detach().to("cpu", torch.float32).contiguous()
        for name, parameter in _lora_parameters(model).items()
    }
    return save(tensors, metadata={"lora": shape})


def decode_adapter(data: bytes) -> AdapterWeights:
    """Read what adapter_bytes wrote. Raises AdapterMismatch for anything else."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        shape = json.loads(header["__metadata__"]["lora"])
        return AdapterWeights(tensors=tensors, rank=int(shape["rank"]), alpha=float(shape["alpha"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterMismatch(f"{len(data)} bytes that are no adapter blob: {error}") from error


def load_adapter_bytes(model: PeftModel, data: bytes) -> None:
    """Copy the adapter in `data` into `model`, in place; all or nothing.

    Raises AdapterMismatch when names, shapes, rank or alpha differ, naming both sides.
    """
    adapter = decode_adapter(data)
    lora = model.peft_config[ADAPTER_NAME]
    if (adapter.rank, adapter.alpha) != (lora.r, float(lora.lora_alpha)):
        raise AdapterMismatch(
            f"adapter has rank {adapter.rank}, alpha {adapter.alpha}; "
            f"the model expects rank {lora.r}, alpha {float(lora.lora_alpha)}"
        )
    _copy(adapter.tensors, _lora_parameters(model))


def checksum(data: bytes) -> str:
    """Hex digest that travels beside published adapter bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
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


def load_adapter(language_model: LanguageModel, folder: Path) -> PeftModel:
    """Wrap the base, in place, with the adapter saved in `folder`; trainable, dropout off.

    An adapter that plain peft wrote has no fingerprint: then only names and shapes are compared.

    Raises:
        FileNotFoundError: `folder` holds no adapter.
        AdapterMismatch: it was trained on another base, or its weights do not fit.
    """
    for name in ("adapter_config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no adapter: {name} is missing; give a folder written by a run"
            )
    written = folder / FINGERPRINT_FILE
    if written.is_file() and written.read_text().strip() != language_model.fingerprint:
        raise AdapterMismatch(
            f"adapter {folder} was trained on base {written.read_text().strip()}, but the loaded "
            f"base is {language_model.fingerprint}; load the base model the adapter belongs to"
        )
    lora = LoraConfig.from_pretrained(str(folder))
    lora.inference_mode = False
    lora.lora_dropout = 0.0
    try:
        model = get_peft_model(language_model.model, lora)
    except ValueError as error:
        raise AdapterMismatch(f"adapter {folder} does not fit this base: {error}") from error
    _copy(load((folder / WEIGHTS_FILE).read_bytes()), _lora_parameters(model))
    return model


def _lora_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """peft's file name -> parameter; the file leaves the adapter's name out."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def _copy(given: dict[str, Tensor], expected: dict[str, torch.nn.Parameter]) -> None:
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
