"""A base model with the adapter folded into its weights, for sampling.

An unmerged adapter adds some ten small operations to every linear layer of every decode step.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lm.adapter import AdapterMismatch, AdapterWeights, decode_adapter
from lm.config import LMConfig
from lm.model import LanguageModel, load_base


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

    def load(self, data: bytes) -> None:
        """Take up the adapter in `data` (from adapter_bytes); all or nothing.

        Raises AdapterMismatch when a layer is not in this model or a shape differs.
        """
        deltas = self._deltas(decode_adapter(data))
        with torch.no_grad():
            for layer in deltas.keys() - self._pristine.keys():
                self._untie(layer)
                self._pristine[layer] = self._layers[layer].weight.detach().clone()
            for layer, pristine in self._pristine.items():
                weight = self._layers[layer].weight
                if layer in deltas:
                    merged = pristine.float() + deltas[layer].to(weight.device)
                    weight.copy_(merged)
                else:
                    weight.copy_(pristine)

    def restore(self) -> None:
        """Take the adapter off: the weights are those of the base again, bit for bit."""
        with torch.no_grad():
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

    def _deltas(self, adapter: AdapterWeights) -> dict[str, Tensor]:
        """Layer -> (alpha / rank) B A, in the layout of that layer's weight, float32."""
        prefix, suffix = "base_model.model.", ".lora_A.weight"
        deltas = {}
        for name, down in adapter.tensors.items():
            if not name.endswith(suffix):
                continue
            layer = name.removeprefix(prefix).removesuffix(suffix)
            up = adapter.tensors.get(name.replace("lora_A", "lora_B"))
            if layer not in self._layers or up is None:
                raise AdapterMismatch(f"adapter targets {layer}, which this base model has not")
            delta = (adapter.alpha / adapter.rank) * (up @ down)
            if isinstance(self._layers[layer], Conv1D):  # stores [in, out]
                delta = delta.T
            if delta.shape != self._layers[layer].weight.shape:
                raise AdapterMismatch(
                    f"adapter changes {layer} by a matrix {tuple(delta.shape)}, "
                    f"its weight is {tuple(self._layers[layer].weight.shape)}"
                )
            deltas[layer] = delta
        return deltas


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
