"""A base model with the adapter folded into its weights, for sampling.

An unmerged adapter adds some ten small operations to every linear layer of every decode step.
"""

import os
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lm.adapter import (
    AdapterMismatch,
    AdapterWeights,
    decode_adapter,
    held_adapter,
    read_adapter,
    save_adapter,
)
from lm.config import LMConfig, LoRAConfig
from lm.hub import ModelUnusable
from lm.model import LanguageModel, attach_adapter, load_base


class MergedModel:
    """Owns a base model and rewrites its targeted weights to W0 + (alpha / rank) B A.

    W0 is kept, and each version is computed from it afresh in float32, so versions never add up
    rounding. With bfloat16 weights the sum is rounded to bfloat16 once: small updates are lost
    there that an unmerged adapter keeps, so sample from the unmerged model then.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.model: PreTrainedModel = language_model.model
        self._layers = {name: m for name, m in self.model.named_modules() if hasattr(m, "weight")}
        self._uses = Counter(id(module.weight) for module in self._layers.values())
        self._pristine: dict[str, Tensor] = {}  # layer -> W0, of every layer ever targeted

    @torch.no_grad()
    def load(self, data: bytes) -> None:
        """Take up the adapter in `data` (from adapter_bytes); all or nothing.

        Raises AdapterMismatch when a layer is not in this model or a shape differs.
        """
        adapter = decode_adapter(data)
        factors = self._factors(adapter)
        for layer in factors.keys() - self._pristine.keys():
            self._untie(layer)
            self._pristine[layer] = self._layers[layer].weight.detach().clone()
        for layer in self._pristine.keys() - factors.keys():
            self._layers[layer].weight.copy_(self._pristine[layer])
        for layer, (up, down) in factors.items():
            delta = adapter.alpha / adapter.rank * (up @ down)
            if isinstance(self._layers[layer], Conv1D):
                delta = delta.T
            weight = self._layers[layer].weight
            weight.copy_(self._pristine[layer].float() + delta.to(weight.device))

    def check(self, adapter: AdapterWeights) -> None:
        """Raise AdapterMismatch where `load` would; changes nothing, and reads no numbers."""
        self._factors(adapter)

    @torch.no_grad()
    def restore(self) -> None:
        """Take the adapter off: the weights are those of the base again, bit for bit."""
        for layer, pristine in self._pristine.items():
            self._layers[layer].weight.copy_(pristine)

    def _untie(self, layer: str) -> None:
        """Give a layer that shares its weight a copy of its own.

        An adapter on an output head that is tied to the embedding changes the head alone.
        """
        module = self._layers[layer]
        if self._uses[id(module.weight)] > 1:
            self._uses[id(module.weight)] -= 1
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
            self._uses[id(module.weight)] = 1
            self.model.config.tie_word_embeddings = False  # else a saved model would load tied

    def _factors(self, adapter: AdapterWeights) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> B and A, of layers that are there and have a weight of the shape of B A."""
        factors = {}
        for name, down in adapter.tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = adapter.tensors.get(name.replace("lora_A", "lora_B"))
            if layer not in self._layers or up is None:
                raise AdapterMismatch(f"adapter targets {layer}, which this base model has not")
            shape = (up.shape[0], down.shape[1])
            if isinstance(self._layers[layer], Conv1D):  # stores [in, out]
                shape = shape[::-1]
            if shape != (weight := self._layers[layer].weight).shape:
                raise AdapterMismatch(
                    f"adapter changes {layer} by a matrix {shape}, its weight is "
                    f"{tuple(weight.shape)}"
                )
            factors[layer] = up, down
        return factors


def check_adaptable(language_model: LanguageModel, lora: LoRAConfig) -> None:
    """Raise ModelUnusable unless an adapter can be put on the base, run, saved, read and merged.

    The base is left as it was, unless it is refused. Of one without weights, layers and shapes are
    compared alone.
    """
    merged = MergedModel(language_model)
    try:
        wrapped = attach_adapter(language_model, lora, seed=0)
        if experts := getattr(wrapped.peft_config["default"], "target_parameters", None):
            raise ValueError(f"peft takes some of them for the fused experts' {sorted(experts)}")
        if wrapped.device.type == "meta":
            merged.check(held_adapter(wrapped))
        else:
            with torch.no_grad():
                wrapped(input_ids=torch.zeros((1, 2), dtype=torch.long, device=wrapped.device))
            with TemporaryDirectory() as folder:
                save_adapter(wrapped, Path(folder), language_model.fingerprint)
                data = read_adapter(Path(folder), language_model.fingerprint)
                merged.check(decode_adapter(data))
    except ModelUnusable:
        raise
    except Exception as error:  # whatever peft makes of layers that it does not foresee
        raise ModelUnusable(
            f"lora.targets = {lora.targets!r} on a {type(language_model.model).__name__} makes an "
            f"adapter that cannot be used ({error}): take 'attention', or name layers of it"
        ) from error
    wrapped.unload()


def save_merged(config: LMConfig, adapter: bytes, folder: Path) -> None:
    """Write `config.model` with an adapter folded in, and its tokenizer, as a model of its own.

    Weights are in `config.dtype`. A reader sees an old folder, a whole new one, or none.

    Args:
        adapter: from lm.adapter.adapter_bytes.

    Raises as load_base and MergedModel.load.
    """
    language_model = load_base(config)
    MergedModel(language_model).load(adapter)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    language_model.model.save_pretrained(partial)
    language_model.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
