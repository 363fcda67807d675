"""A base causal language model with its tokenizer, and the adapter put on it."""

import ctypes
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lm.config import LARGE, LMConfig, LoRAConfig
from lm.hub import ModelUnusable, explained, load_model_config, load_tokenizer
from lm.spelling import text_prefix
from lm.weight_files import (
    Forgetting,
    Replace,
    fingerprint,
    read_in_pieces,
    read_whole,
    weight_files,
)

# What a causal LM is called outside this room, which alone knows the library behind it.
CausalLM = PreTrainedModel

# Blocks from this size on go back to the system as soon as they are freed: a hidden state and up.
_RETURNED_BYTES = 2**18
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_TEXT_PREFIX = "text_prefix"  # attribute of a base, which an adapter and an engine pass on


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageModel:
    """A frozen base model in eval mode, its tokenizer, and what identifies its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # hex; equal for equal config and weights, whatever the dtype or folder


def load_base(config: LMConfig) -> LanguageModel:
    """Load `config.model`, freeze it, and switch every dropout off.

    Raises:
        ModelNotFound: no such folder, and no such model on the hub.
        ModelUnusable: no causal LM, weights or tokenizer missing or not matching the config.
    """
    device = device_of(config)
    declared = load_model_config(config)
    tokenizer = _fitting_tokenizer(config, declared)
    model = read_whole(config, declared)
    freeze(model)
    if is_large(model):
        return_freed_memory()
    with explained(config.model, f"the weights into memory of {device}"):
        model.to(device)
    set_text_prefix(model, text_prefix(config, tokenizer))
    return LanguageModel(model=model, tokenizer=tokenizer, fingerprint=fingerprint(model))


def inspect_base(config: LMConfig, *, fetch: bool = True) -> LanguageModel:
    """The same base on the meta device, where it has no weights; raises as load_base.

    Its files are read for names, shapes and fingerprint, a tensor at a time, and none is kept.

    Args:
        fetch: whether to download files of weights for that; else, where they are not here, the
            fingerprint is empty, and whoever loads them finds what is wrong with them.
    """
    model = build_without_weights(config)
    tokenizer = _fitting_tokenizer(config, model.config)
    found = ""
    files = weight_files(config, fetch=fetch)
    if files or fetch or os.path.isdir(config.model):
        forgetting = Forgetting()
        model = read_in_pieces(config, model, files, forgetting)
        freeze(model)
        found = fingerprint(model, forgetting.samples)
    set_text_prefix(model, text_prefix(config, tokenizer))
    return LanguageModel(model=model, tokenizer=tokenizer, fingerprint=found)


def load_shard(config: LMConfig, files: Sequence[str], replace: Replace) -> PreTrainedModel:
    """The frozen base of which `replace` keeps what is this process's of each parameter.

    Args:
        files: `weight_files`, which takes as long as they have to be fetched.

    Raises as load_base.
    """
    empty = build_without_weights(config)
    if is_large(empty):
        return_freed_memory()
    model = read_in_pieces(config, empty, files, replace)
    freeze(model)
    set_text_prefix(model, text_prefix(config, load_tokenizer(config)))
    return model


def build_without_weights(config: LMConfig) -> PreTrainedModel:
    """The frozen base model that `config` names, on the meta device.

    Raises:
        ModelNotFound: no such folder, and no such model on the hub.
        ModelUnusable: no causal LM.
    """
    declared = load_model_config(config)
    with explained(config.model, "the architecture"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            declared,
            dtype=getattr(torch, config.dtype),
            attn_implementation="eager" if config.attention == "eager" else None,
            trust_remote_code=config.trust_remote_code,
        )
    freeze(model)
    return model


def _fitting_tokenizer(config: LMConfig, declared: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer; ModelUnusable where it has more tokens than the model."""
    tokenizer = load_tokenizer(config)
    if len(tokenizer) > (words := vocab_size(declared)):
        raise ModelUnusable(
            f"model {config.model!r}: tokenizer has {len(tokenizer)} tokens, the model only "
            f"{words}; they do not belong together"
        )
    return tokenizer


def device_of(config: LMConfig) -> torch.device:
    """Where models are held; raises ModelUnusable where a GPU is named and there is none."""
    seen = torch.cuda.is_available()
    if config.device == "cuda" and not seen:
        raise ModelUnusable(
            "device 'cuda' asked for, but torch sees no GPU: claim one for the part "
            "(cluster.*_placement.gpus), or use 'auto' or 'cpu'"
        )
    return torch.device("cuda" if seen and config.device != "cpu" else "cpu")


def is_large(model: nn.Module) -> bool:
    """Whether its activations are worth saving."""
    return sum(parameter.numel() for parameter in model.parameters()) > LARGE


def return_freed_memory() -> None:
    """Let this process give back what it frees; for models whose activations count.

    Left to itself glibc raises the size up to which it keeps freed blocks to 32 MB, and what a
    pass has taken and given up stays with the process, in pieces: measured on a model of 135M
    parameters, four times what was alive at any time. Does nothing where libc is another.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


def freeze(model: nn.Module) -> None:
    """Put `model` in eval mode, without gradients and with every dropout rate at zero.

    At zero, since an engine that calls train() must not change the policy's probabilities.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - not declared on nn.Module


def recompute_activations(model: nn.Module) -> None:
    """Let backward passes recompute what happens inside a layer, instead of keeping it.

    A pass then keeps a thirtieth, at the price of another forward pass; values and gradients stay.

    Raises ModelUnusable when the architecture does not say what its layers are.
    """
    base: Any = getattr(model, "module", model)
    kinds = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ModelUnusable(
            f"learner.checkpointing: a {type(base).__name__} does not name its layers, so their "
            "activations cannot be recomputed; set learner.checkpointing = false"
        )
    for layer in layers:
        # No layer draws random numbers: every dropout rate is zero.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def attach_adapter(language_model: LanguageModel, config: LoRAConfig, seed: int) -> PeftModel:
    """Wrap the base, in place, with a trainable LoRA adapter that starts as the identity (B = 0).

    A is drawn from `seed` alone. Raises ModelUnusable as `adapted_layers`.
    """
    base = language_model.model
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=adapted_layers(base, config),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # Peft foresees ranks of fused experts whether or not these are adapted.
        warnings.filterwarnings(
            "ignore", message=r"The following (rank|alpha)_pattern keys .*ignored"
        )
        return get_peft_model(base, lora)


def adapted_layers(base: PreTrainedModel, config: LoRAConfig) -> str | list[str]:
    """What `config.targets` is of this architecture, as peft takes it: layer names or their ends.

    Raises ModelUnusable where a target names no linear layer, or nothing is called attention.
    """
    linear = [n for n, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    within = _language_part(base)
    if config.targets == "auto":
        fused_experts = any(parameter.ndim == 3 for parameter in base.parameters())
        if not within and not fused_experts:
            return "all-linear"
        # Peft would wrap fused experts too, which are no layers, and what reads pictures; and a
        # router that is no plain linear layer may answer with more than its product.
        head = _name_of(base, base.get_output_embeddings())
        plain = [n for n in linear if type(base.get_submodule(n)) in (nn.Linear, Conv1D)]
        return [name for name in plain if name.startswith(within) and name != head]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if config.targets == "attention":
        # Whole names: an end such as c_proj is that of a layer of GPT-2's MLP too.
        found = [n for n in linear if n.startswith(within) and _in_attention(base, n)]
        if not found:
            raise ModelUnusable(
                f"lora.targets is 'attention', and no part of a {type(base).__name__} is called "
                f"so: name layers instead; there are {leaves}"
            )
        return found
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ModelUnusable(
                f"lora.targets: {target!r} names no linear layer of a {type(base).__name__}; there "
                f"are {leaves}. 'auto' fits any architecture, 'attention' any that has one"
            )
    return list(config.targets)


def model_config(model: nn.Module | PretrainedConfig) -> PretrainedConfig:
    """Of the language part of `model`, of the model an engine wraps, or of one to be loaded."""
    if isinstance(model, nn.Module):
        model = getattr(model, "module", model).config
    assert isinstance(model, PretrainedConfig), type(model)
    return model.get_text_config()


def set_text_prefix(model: nn.Module, token_ids: tuple[int, ...]) -> None:
    """Let these tokens stand in front of every text that is read by this model."""
    setattr(model, _TEXT_PREFIX, token_ids)


def text_prefix_of(model: nn.Module) -> tuple[int, ...]:
    """Token ids in front of every text, as whoever runs a pass through `model` puts them there."""
    prefix: tuple[int, ...] = getattr(getattr(model, "module", model), _TEXT_PREFIX, ())
    return prefix


def vocab_size(model: nn.Module | PretrainedConfig) -> int:
    """Width of the logits of `model`, of the model an engine wraps, or of a model to be loaded."""
    return int(model_config(model).vocab_size)


def context_limit(model: nn.Module | PretrainedConfig) -> int:
    """Longest text, in tokens, that `model` has positions for behind its `text_prefix_of`."""
    config: Any = model_config(model)
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # These stretch the positions of a whole batch by its longest text, beyond this length.
        limits.append(rope.get("original_max_position_embeddings"))
    longest = min((int(limit) for limit in limits if limit is not None), default=sys.maxsize)
    return longest - (len(text_prefix_of(model)) if isinstance(model, nn.Module) else 0)


def require_context(model: nn.Module, num_tokens: int) -> None:
    """Raise ValueError when a text is too long for `model`, or for the model an engine wraps."""
    if num_tokens > (limit := context_limit(model)):
        raise ValueError(
            f"a text of {num_tokens} tokens exceeds the {limit} tokens of the model's context; "
            "shorten the prompt or lower max_len"
        )


def _language_part(base: PreTrainedModel) -> str:
    """Prefix of the names of what reads text, in a model that reads other things too; else ''."""
    config = getattr(base, "config", None)
    if config is None or config.get_text_config() is config:
        return ""
    return f"{_name_of(base, base.get_decoder())}."


def _name_of(base: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in base.named_modules() if module is wanted), "")


def _in_attention(base: nn.Module, layer: str) -> bool:
    """Whether a module around the layer is an attention, by its name or that of its class."""
    parts = layer.split(".")
    for depth in range(1, len(parts)):
        kind = type(base.get_submodule(".".join(parts[:depth]))).__name__.lower()
        # JambaAttentionDecoderLayer, ...AttentionPoolingHead: these hold other things too.
        whole = "layer" in kind or kind.endswith("head")
        if "attn" in parts[depth - 1].lower() or ("attention" in kind and not whole):
            return True
    return False
