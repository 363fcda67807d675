"""A base LM that a process loads once, and uses as the frozen LM and as policies by turns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lm.adapter import load_adapter, read_adapter
from lm.config import LMConfig
from lm.hub import load_tokenizer
from lm.merged import MergedModel
from lm.model import CausalLM, LanguageModel, load_base


class SharedModel:
    """The LM of a configuration; its weights are loaded when they are first asked for.

    One user at a time: whoever holds an adapter on it changes it for everybody.
    """

    def __init__(
        self,
        config: LMConfig,
        check: Callable[[LMConfig, LanguageModel], None] = lambda config, base: None,
    ) -> None:
        """`check`: is shown the base once it is loaded; raises where that must not be used."""
        self._config = config
        self._check = check

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Without the weights; raises as load_tokenizer."""
        return load_tokenizer(self._config)

    @cached_property
    def base(self) -> LanguageModel:
        """With the weights; raises as load_base."""
        base = load_base(self._config)
        self._check(self._config, base)
        return base

    @cached_property
    def _merged(self) -> MergedModel:
        return MergedModel(self.base)

    @contextmanager
    def with_adapter(self, folder: Path | None) -> Iterator[CausalLM]:
        """Inside, the base computes what it does with the adapter in `folder`; None: by itself.

        In float32 the adapter is folded into the weights, which samples faster, and taken out
        again bit for bit. In bfloat16 that would round small updates away: it stays beside them.

        Raises FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        """
        model = self.base.model
        if folder is None:
            yield model
        elif model.dtype != torch.float32:
            with self.beside(folder):
                yield model
        else:
            self._merged.load(read_adapter(folder, self.base.fingerprint))
            try:
                yield model
            finally:
                self._merged.restore()

    @contextmanager
    def beside(self, folder: Path) -> Iterator[CausalLM]:
        """Inside, the adapter's layers stand beside the base's own: `adapter_off` turns them off.

        Raises as with_adapter.
        """
        wrapped = load_adapter(self.base, folder)
        try:
            yield self.base.model
        finally:
            wrapped.unload()
