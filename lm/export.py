"""A policy as a folder that other programs load: an adapter beside its base, or a whole model.

An adapter is in peft's format, which transformers, peft and vLLM read; a merged model is in that of
transformers. Tokenizer, generation configuration and model card lie beside either.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load, save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lm.actions import ActionSpace
from lm.adapter import FINGERPRINT_FILE, WEIGHTS_FILE, read_adapter
from lm.config import LMConfig
from lm.hub import load_model_config, load_tokenizer
from lm.merged import MergedModel
from lm.model import load_base, vocab_size

CARD_FILE = "README.md"  # as the hub calls it
ExportType = Literal["float32", "bfloat16"]
DTYPES: dict[str, ExportType] = {"fp32": "float32", "bf16": "bfloat16"}  # as people write them


class ExportRefused(ValueError):
    """An export that would write over something, or that the hub does not take."""


def export_policy(
    config: LMConfig,
    adapter: Path,
    folder: Path,
    *,
    actions: ActionSpace | None,
    merge: bool,
    dtype: ExportType | None,
    card: str,
) -> None:
    """Write the policy, whole or not at all.

    Args:
        config: the base, as the adapter was trained on it.
        adapter: folder that a run has written.
        folder: does not exist, or is empty.
        actions: what the policy may write; None: any text, which its end-of-text token ends.
        merge: fold the adapter into the base's weights, rather than leave it beside them.
        dtype: of the weights that are written; None: as they are.
        card: the model card, in Markdown.

    Raises:
        ExportRefused: the folder holds something.
        what load_base and read_adapter raise.
    """
    tokenizer = load_tokenizer(config)
    with whole_folder(folder) as partial:
        if merge:
            _write_merged(config, adapter, partial, dtype)
        else:
            _write_adapter(config, adapter, partial, dtype)
        tokenizer.save_pretrained(partial)
        if actions is not None:
            vocabulary = vocab_size(load_model_config(config))
            generation_config(actions, tokenizer, vocabulary).save_pretrained(partial)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")


def generation_config(
    actions: ActionSpace, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> GenerationConfig:
    """Settings with which plain `generate` draws completions from the policy.

    It calls no tool, and stops wherever the length allows it: `stop_after_tool`, `stop_behind` and
    `stop_every` cannot be said there.
    """
    illegal = None
    if actions.legal_tokens is not None:
        illegal = np.setdiff1d(np.arange(vocabulary), actions.columns(vocabulary)).tolist()
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=actions.min_len or None,
        max_new_tokens=actions.max_len,
        suppress_tokens=illegal,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=actions.stop_token,
        pad_token_id=actions.stop_token if pad is None else pad,
    )


def check_target(folder: Path) -> None:
    """Raise ExportRefused unless the folder is empty or does not exist."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportRefused(f"{folder} exists and holds something: name a new folder")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place and its name when everything is written.

    Raises ExportRefused where something is there already; leaves nothing behind where it fails.
    """
    check_target(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_push(repository: str) -> None:
    """Raise ExportRefused where nothing could be pushed; asks nobody."""
    if get_token() is None:
        raise ExportRefused(
            f"cannot push to {repository!r}: there is no token of the Hugging Face hub; set "
            "HF_TOKEN, or log in with 'hf auth login'"
        )


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder into a repository, which is made, private, if it is missing.

    Returns its address. Raises ExportRefused with what the hub said.
    """
    check_push(repository)
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        said = " ".join(str(error).split())
        raise ExportRefused(
            f"cannot push to {repository!r}: {said}; {folder} is whole, so push it again with "
            f"'hf upload {repository} {folder}'"
        ) from error
    return str(address)


def _write_adapter(config: LMConfig, adapter: Path, folder: Path, dtype: ExportType | None) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": config.model, "revision": config.revision}
    settings["inference_mode"] = True
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    tensors = load((adapter / WEIGHTS_FILE).read_bytes())
    if dtype is not None:
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copy(adapter / FINGERPRINT_FILE, folder)


def _write_merged(config: LMConfig, adapter: Path, folder: Path, dtype: ExportType | None) -> None:
    base = load_base(config.model_copy(update={"device": "cpu"}))
    data = read_adapter(adapter, base.fingerprint)
    if dtype == "float32":
        base.model.float()  # before the sum: the policy is a rounded base and an exact adapter
    MergedModel(base).load(data)
    if dtype is not None:
        base.model.to(getattr(torch, dtype))
    base.model.save_pretrained(folder)
