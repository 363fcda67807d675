"""Where a model comes from: a folder or the hub, what can be wrong with it, and what of it needs
no weights, which are its tokenizer and its configuration.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from lm.config import LMConfig

LFS_POINTER = b"version https://git-lfs"
LONGEST_REASON = 300  # characters of a library's own words in an error of ours
_ANSWER_TIMEOUT_S = 4.0


class ModelNotFound(FileNotFoundError):
    """The configured model is neither a folder here nor a reachable hub id."""


class ModelUnusable(ValueError):
    """The configured model exists but cannot serve as a causal language model."""


def load_tokenizer(config: LMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.model`, without its weights.

    Raises ModelNotFound for no such folder or hub id, ModelUnusable where it has no tokenizer.
    """
    require_folder_or_hub_id(config.model, config.revision)
    with explained(config.model, "the tokenizer"):
        return AutoTokenizer.from_pretrained(config.model, **hub_arguments(config))


def load_model_config(config: LMConfig) -> PretrainedConfig:
    """The architecture of `config.model`, without its weights.

    Raises as load_tokenizer, and ModelUnusable where it is quantised, or no decoder alone.
    """
    require_folder_or_hub_id(config.model, config.revision)
    with explained(config.model, "config.json"):
        declared = AutoConfig.from_pretrained(config.model, **hub_arguments(config))
    _require_whole_weights(config.model, declared)
    if declared.is_encoder_decoder:
        raise ModelUnusable(
            f"model {config.model!r} ({declared.model_type}) is an encoder and a decoder; only "
            "causal language models, which are a decoder alone, can be the base"
        )
    return declared


def hub_arguments(config: LMConfig) -> dict[str, Any]:
    """What every `from_pretrained` of the model is told besides its name."""
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _require_whole_weights(model: str, declared: PretrainedConfig) -> None:
    """Raise ModelUnusable for weights of 4 or 8 bits, by config.json alone."""
    parts = (declared, declared.get_text_config())
    settings = (getattr(part, "quantization_config", None) for part in parts)
    if (quantised := next(filter(None, settings), None)) is not None:
        method = dict(quantised).get("quant_method", "a method that it does not name")
        raise ModelUnusable(
            f"model {model!r} is quantised ({method}, quantization_config in config.json): an "
            "adapter is trained beside whole weights and folded into them; take the model that "
            'this one was made from, with lm.dtype = "bfloat16" where memory is short'
        )


def require_folder_or_hub_id(model: str, revision: str | None = None) -> None:
    """Raise ModelNotFound or ModelUnusable for a path that cannot be a model's."""
    logging.disable_progress_bar()  # it would write over the run's own display
    hub_logging.set_verbosity_error()  # so would every try to reach the hub
    path = Path(model)
    if not path.exists():
        if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
            raise ModelNotFound(
                f"model {model!r}: no such folder; give a folder that holds config.json, "
                "*.safetensors and tokenizer.json, or a hub id"
            )
        ask_hub(model, revision)
        return
    if not (path / "config.json").is_file():
        raise ModelUnusable(
            f"model {model!r} is no model folder: it holds no config.json; "
            "give a folder written by save_pretrained"
        )
    spellings = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any((path / name).is_file() for name in spellings):
        raise ModelUnusable(
            f"model {model!r} has no tokenizer (tokenizer.json); save the tokenizer of this "
            "model into the same folder"
        )
    for file in (*path.glob("*.safetensors"), *path.glob("tokenizer*"), *path.glob("*.bin")):
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelUnusable(
                    f"model {model!r}: {file.name} is a pointer of git-lfs, not the file: "
                    "run `git lfs pull` where it was cloned"
                )


def ask_hub(model: str | None = None, revision: str | None = None) -> None:
    """Where the hub is silent, let this process look into the cache alone from now on.

    The libraries would ask half a minute for each file, of what lies in the cache too. One that is
    only slow may still give them a `model` that is not there.
    """
    if constants.is_offline_mode() or (failure := _failure(constants.ENDPOINT)) is None:
        return
    slow = "timeout" in type(failure).__name__.lower()
    if slow and model is not None:
        kept = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(kept, str):
            return
    constants.HF_HUB_OFFLINE = True


@cache
def _failure(endpoint: str) -> Exception | None:
    """Why the hub, asked twice, gave no answer; None where it gave one."""
    failure: Exception | None = None
    for _ in range(2):
        try:
            get_session().head(endpoint, timeout=_ANSWER_TIMEOUT_S)
        except Exception as error:  # of whichever library speaks to it
            failure = error
        else:
            return None
    return failure


@contextmanager
def explained(model: str, part: str) -> Iterator[None]:
    """Turn whatever the library raises while reading `part` of `model` into a sentence."""
    try:
        yield
    except (ModelNotFound, ModelUnusable):
        raise
    except Exception as error:  # libraries of quantisation, files and architectures raise anything
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise ModelNotFound(
                f"model {model!r}: there is no such folder, {part} is not in the cache "
                f"({constants.HF_HUB_CACHE}), and the hub ({constants.ENDPOINT}) is not reached: "
                "check the name, or the network and HF_HUB_OFFLINE, or fetch the model there before"
            ) from error
        kind = ModelUnusable if Path(model).exists() else ModelNotFound
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}..."
        remedy = "install what it names, or take another model"
        if isinstance(error, SafetensorError | EOFError):
            remedy = "a file is damaged or cut off: fetch the model again"
        elif "trust_remote_code" in str(error):
            remedy = "set lm.trust_remote_code = true if you trust the Python files beside it"
        elif not isinstance(error, ImportError):
            remedy = f"see that {model} is a whole causal language model"
        raise kind(f"model {model!r}: cannot load {part}: {said}; {remedy}") from error
