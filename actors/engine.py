"""The rollout engines: ours; and vLLM's, which is loaded only where a run asks for it."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch

from actors.config import ActorConfig
from actors.protocols import RolloutEngine
from lm.actions import ActionSpace
from lm.adapter import load_adapter_bytes
from lm.config import LMConfig, LoRAConfig
from lm.memory import kv_cache_bytes
from lm.merged import MergedModel
from lm.model import CausalLM, LanguageModel, attach_adapter, device_of
from lm.sampling import Ended, Request, Sampler
from lm.tools import Tool

_BLOCK = 128  # tokens; no block of vLLM's cache is larger

# What vLLM is told by its environment alone, some of it while it is imported.
_VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of its own could not be told the task's law
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # nor could that, on which others would be in force
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are for whoever starts actors to share out
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class EngineRefused(ValueError):
    """A rollout engine that is not here, or that cannot serve this base, adapter or run."""


class NativeEngine(RolloutEngine):
    """Samples by `lm.sampling`; takes new adapter weights between calls.

    In float32 the adapter is folded into the weights, which decodes faster. In bfloat16 that would
    round small updates away, so there it stays beside them. The language model becomes this
    engine's own; at most `max_rows` completions are under way at once.
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
        steady: bool = True,
        tool_timeout_s: float = 600.0,
    ) -> None:
        """`steady`, `tool_timeout_s`: see `lm.sampling.Sampler`."""
        self.model: CausalLM = language_model.model  # with the newest adapter
        self._load: Callable[[bytes], None]
        if self.model.dtype == torch.float32:
            self._load = MergedModel(language_model).load
        else:
            self.model = attach_adapter(language_model, lora, seed)
            self._load = partial(load_adapter_bytes, self.model)
        self._sampler = Sampler(
            self.model,
            actions,
            tool,
            max_rows=max_rows,
            steady=steady,
            tool_timeout_s=tool_timeout_s,
        )
        device = next(self.model.parameters()).device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    @property
    def random_state(self) -> bytes:
        return self._generator.get_state().numpy().tobytes()

    @random_state.setter
    def random_state(self, state: bytes) -> None:
        self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """See `RolloutEngine`."""
        return self._sampler.submit(requests)

    def poll(self) -> list[Ended]:
        """Another token of every row that has a place; raises PolicyDiverged."""
        return self._sampler.step(self._generator)

    def load(self, adapter: bytes) -> None:
        """Take up an adapter from `lm.adapter.adapter_bytes`; raises AdapterMismatch."""
        self._sampler.forget_prompts()
        self._load(adapter)


def vllm_cache_bytes(shape: CausalLM, *, max_rows: int, columns: int) -> int:
    """Of the cache that vLLM is given for `max_rows` texts of `columns` tokens, in whole blocks."""
    # One row more, as vLLM keeps a block to itself.
    return kv_cache_bytes(shape, rows=max_rows + 1, columns=-(-columns // _BLOCK) * _BLOCK)


def check_engine(config: ActorConfig) -> None:
    """Raise EngineRefused where `actors.engine` is not installed."""
    if config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EngineRefused(
            'actors.engine = "vllm", but vLLM is not installed here: install it with '
            "`pip install -e '.[vllm]'`, on every machine that has actors, or leave the key out"
        )


def vllm_engine(
    lm: LMConfig,
    config: ActorConfig,
    actions: ActionSpace,
    tool: Tool | None,
    *,
    lora: LoRAConfig,
    longest_prompt: int,
    seed: int,
) -> RolloutEngine:
    """vLLM around the base LM of `lm`, whose weights it loads itself.

    Args:
        longest_prompt: tokens of the longest that will be asked.

    Raises EngineRefused where vLLM is not installed, or cannot serve this base or its adapters.
    """
    check_engine(config)
    settings = dict(_VLLM_ENVIRONMENT)
    if device_of(lm).type == "cpu":
        settings["TORCHDYNAMO_DISABLE"] = "1"  # a minute of compiling that saves milliseconds
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    module = importlib.import_module("actors.vllm_engine")
    engine: RolloutEngine = module.VLLMEngine(
        lm,
        actions,
        tool,
        lora=lora,
        max_rows=config.max_rows,
        tool_timeout_s=config.tool_timeout_s,
        longest_prompt=longest_prompt,
        seed=seed,
    )
    return engine
