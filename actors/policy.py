"""The policy as an actor holds it: the base LM with the newest adapter, and our sampler."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from lm.actions import ActionSpace
from lm.adapter import load_adapter_bytes
from lm.config import LoRAConfig
from lm.merged import MergedModel
from lm.model import CausalLM, LanguageModel, attach_adapter
from lm.sampling import Completion, Request, Sampler, Tool


class SamplingPolicy:
    """Samples completions; takes new adapter weights between calls.

    In float32 the adapter is folded into the weights, which decodes faster. In bfloat16 that would
    round small updates away, so there it stays beside them. The language model becomes this
    policy's own; at most `max_rows` completions are under way at once.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        actions: ActionSpace,
        tool: Tool | None,
        *,
        lora: LoRAConfig,
        max_rows: int,
        seed: int,
    ) -> None:
        self.model: CausalLM = language_model.model  # with the newest adapter
        self._load: Callable[[bytes], None]
        if self.model.dtype == torch.float32:
            self._load = MergedModel(language_model).load
        else:
            self.model = attach_adapter(language_model, lora, seed)
            self._load = partial(load_adapter_bytes, self.model)
        self._sampler = Sampler(self.model, actions, tool, max_rows=max_rows)
        device = next(self.model.parameters()).device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    @property
    def random_state(self) -> bytes:
        return self._generator.get_state().numpy().tobytes()

    @random_state.setter
    def random_state(self, state: bytes) -> None:
        self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        return self._sampler.sample(requests, self._generator)

    def load(self, adapter: bytes) -> None:
        """Take up an adapter from `lm.adapter.adapter_bytes`; raises AdapterMismatch."""
        self._load(adapter)
