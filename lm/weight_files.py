"""The weights of a model in its files: loaded whole, or read one tensor at a time and not kept.

Which tensor of a file is which parameter is transformers' business, here too; what a parameter is
replaced by, as soon as it has been read, may be the caller's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from lm.config import LMConfig
from lm.hub import ModelUnusable, explained, hub_arguments

# Given a parameter that was just read, gives what the model is to have in its place.
Replace = Callable[[nn.Parameter], nn.Parameter]

# Of each weight tensor this many values, evenly spread, enter the fingerprint: a 6B model is
# hashed in a second, and no two trainings agree on all of them.
FINGERPRINT_VALUES = 4096
# What from_pretrained, moving files or another library version may change, weights staying.
VOLATILE_CONFIG = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
VOLATILE_CONFIG |= {"use_cache", "_attn_implementation_autoset"}
_NAMED = 3  # tensors that an error names of each kind
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # what transformers asks whether it may read ahead


def read_whole(config: LMConfig, declared: PretrainedConfig) -> PreTrainedModel:
    """The model with its weights, on the CPU; ModelUnusable where they are not all there."""
    with explained(config.model, "the weights"):
        loaded = AutoModelForCausalLM.from_pretrained(
            config.model, **hub_arguments(config), **_arguments(config, declared)
        )
    return _checked(config, *loaded)


def read_in_pieces(
    config: LMConfig, empty: PreTrainedModel, files: Sequence[str], replace: Replace
) -> PreTrainedModel:
    """The same with every parameter replaced as soon as it is read: one is held at a time.

    Where the model comes in another format than safetensors, its files are mapped into memory.

    Args:
        empty: the model on the meta device.
        files: `weight_files`.
    """
    own = {"trust_remote_code": config.trust_remote_code}
    with ExitStack() as opened, explained(config.model, "the weights"):
        pieces: dict[str, Any] = {}
        for file in files:
            # Read, not mapped: what was mapped counts as memory of this process till the end.
            pointer = opened.enter_context(safe_open(file, framework="pt", backend="pread"))
            pieces |= {name: pointer.get_slice(name) for name in pointer.keys()}  # noqa: SIM118
        source = (None, {"state_dict": pieces}) if pieces else (config.model, hub_arguments(config))
        opened.enter_context(_replacing(replace))
        loaded = type(empty).from_pretrained(
            source[0], **own | source[1], **_arguments(config, empty.config)
        )
    return _checked(config, *loaded)


def weight_files(config: LMConfig, *, fetch: bool = True) -> list[str]:
    """The safetensors files of the model, fetched if they are not here; none of another format.

    Without `fetch`: none where one of them is not here.
    """

    def fetched(name: str) -> str | None:
        path: str | None = cached_file(
            config.model,
            name,
            revision=config.revision,
            local_files_only=not fetch,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=fetch,
        )
        return path

    with explained(config.model, "the weights"):
        if (index := fetched(SAFE_WEIGHTS_INDEX_NAME)) is None:
            whole = fetched(SAFE_WEIGHTS_NAME)
            return [] if whole is None else [whole]
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        found = [path for name in names if (path := fetched(name)) is not None]
        return found if fetch or len(found) == len(names) else []


class Forgetting:
    """Replaces parameters by ones without numbers; keeps the sample that the fingerprint is of."""

    def __init__(self) -> None:
        self.samples: dict[nn.Parameter, bytes] = {}

    def __call__(self, parameter: nn.Parameter) -> nn.Parameter:
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        self.samples[empty] = _sample(parameter)
        return empty


def fingerprint(model: PreTrainedModel, samples: Mapping[nn.Parameter, bytes] | None = None) -> str:
    """Hex digest of the configuration and of a spread sample of every weight, in bfloat16.

    bfloat16, so that a model loaded in float32 and the same in bfloat16 agree.

    Args:
        samples: of the weights of a model that has none, as `Forgetting` has kept them.
    """
    stable = _stable(model.config.to_diff_dict())
    digest = hashlib.blake2b(repr(sorted(stable.items())).encode(), digest_size=16)
    for name, weight in sorted(dict(model.named_parameters()).items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(_sample(weight) if samples is None else samples[weight])
    return digest.hexdigest()


def _stable(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what is volatile, in the settings of a part, such as `text_config`, too."""
    return {
        name: _stable(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in VOLATILE_CONFIG
    }


def _sample(weight: nn.Parameter) -> bytes:
    flat = weight.detach().flatten()
    sample = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)]
    return sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def _arguments(config: LMConfig, declared: PretrainedConfig) -> dict[str, Any]:
    return {
        "config": declared,
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": None if config.attention == "auto" else config.attention,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # for `_checked` to say it in a sentence
    }


def _checked(
    config: LMConfig, model: PreTrainedModel, report: Mapping[str, Any]
) -> PreTrainedModel:
    """The model, unless its files leave a parameter out or have one of another shape."""
    mismatched = report["mismatched_keys"]
    found = {
        "are not in its files": report["missing_keys"],
        "have another shape there": {
            f"{n} {list(has)}, not {list(own)}" for n, has, own in mismatched
        },
        "belong nowhere": report["unexpected_keys"],
    }
    if report["missing_keys"] or mismatched:
        said = "; ".join(
            f"{len(names)} weights {what}, among them {', '.join(sorted(names)[:_NAMED])}"
            for what, names in found.items()
            if names
        )
        raise ModelUnusable(
            f"model {config.model!r}: {said}; its config.json and its weights do not belong "
            "together"
        )
    return model


@contextmanager
def _replacing(replace: Replace) -> Iterator[None]:
    """Within the block a parameter with numbers that a module is given is replaced, once.

    Tensors are read when the model is given them, not ahead by threads.
    """
    replaced: set[nn.Parameter] = set()

    def registering(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or parameter in replaced:
            return None
        own: Any = replace(parameter)
        own._is_hf_initialized = True  # else transformers would draw it anew
        replaced.add(own)
        return own

    before = os.environ.get(_NO_THREADS, "0")
    os.environ[_NO_THREADS] = "1"
    handle = register_module_parameter_registration_hook(registering)
    try:
        yield
    finally:
        handle.remove()
        os.environ[_NO_THREADS] = before
