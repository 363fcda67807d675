"""Stands in for vLLM: draws from what the law makes of plain passes, a token of each row a step."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from actors.protocols import RolloutEngine
from lm.actions import ActionSpace
from lm.config import LMConfig, LoRAConfig
from lm.model import load_base, vocab_size
from lm.tools import Tool

_OURS = "actors.vllm_engine"


class SamplingParams(SimpleNamespace):
    """As far as it is read here."""

    stop_token_ids: tuple[int, ...] = ()
    logprob_token_ids: tuple[int, ...] = ()


class LLMEngine:
    """Of its protocol what a rollout engine uses."""

    steps = 0  # that were taken with something to draw

    def __init__(self, arguments: SimpleNamespace) -> None:
        self.model: PreTrainedModel = load_base(LMConfig(model=arguments.model)).model
        width = vocab_size(self.model)
        shape = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: width))
        self._law = arguments.logits_processors[0](shape, torch.device("cpu"), False)
        self._generator = torch.Generator().manual_seed(arguments.seed)
        self._most = arguments.max_num_seqs
        self._requests: dict[str, SimpleNamespace] = {}

    @classmethod
    def from_engine_args(cls, arguments: SimpleNamespace) -> "LLMEngine":
        return cls(arguments)

    def add_request(
        self, name: str, prompt: Any, params: SamplingParams, lora_request: Any = None
    ) -> None:
        text = prompt["prompt_token_ids"]
        row = SimpleNamespace(params=params, prompt=text, token_ids=[], logprobs=[])
        self._requests[name] = row
        assert len(self._requests) <= self._most

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self._requests[name]

    @torch.no_grad()
    def step(self) -> list[SimpleNamespace]:
        rows = list(self._requests.values())
        self.steps += bool(rows)
        texts = [[*row.prompt, *row.token_ids] for row in rows]
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        last = [len(text) - 1 for text in texts]
        logits_NV = self.model(input_ids=ids).logits[torch.arange(len(rows)), last]
        self._law.update_state([(row.params, row.prompt, row.token_ids) for row in rows])
        log_p_NV = self._law.apply(logits_NV)
        drawn = torch.multinomial(log_p_NV.exp(), 1, generator=self._generator)[:, 0].tolist()
        for row, token, log_p_V in zip(rows, drawn, log_p_NV.tolist(), strict=True):
            row.token_ids.append(token)
            told = (token, *row.params.logprob_token_ids)
            row.logprobs.append({t: SimpleNamespace(logprob=log_p_V[t]) for t in told})
        return [self._output(name) for name in list(self._requests) if self._is_over(name)]

    def _is_over(self, name: str) -> bool:
        row = self._requests[name]
        full = len(row.token_ids) >= row.params.max_tokens
        return full or row.token_ids[-1] in row.params.stop_token_ids

    def _output(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(request_id=name, outputs=[self._requests.pop(name)])


class LogitsProcessor:
    """What the law derives from."""


def _took_place(states: dict[int, Any], rows: list[Any], state_of: Any) -> None:
    states.clear()
    states.update({place: state_of(*row) for place, row in enumerate(rows)})


_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {
        "EngineArgs": SimpleNamespace,
        "LLMEngine": LLMEngine,
        "SamplingParams": SamplingParams,
    },
    "vllm.config.lora": {"MaxLoRARanks": Literal[8, 16]},
    "vllm.lora.request": {"LoRARequest": SimpleNamespace},
    "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
    "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=None)},
    "vllm.v1.sample.logits_processor": {
        "BatchUpdate": list,
        "LogitsProcessor": LogitsProcessor,
    },
    "vllm.v1.sample.logits_processor.builtin": {"process_dict_updates": _took_place},
}


@contextmanager
def instead_of_vllm() -> Iterator[ModuleType]:
    """`actors.vllm_engine`, read anew with this in the place of vLLM, be that here or not."""
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in _MODULES.items():
            module = ModuleType(name)
            vars(module).update(contents)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, _OURS, raising=False)
        ours = importlib.import_module(_OURS)
        del sys.modules[_OURS]
        vars(ours)["TemporaryDirectory"] = SimpleNamespace  # no adapter comes that would need it
        yield ours


def engine_of(
    ours: ModuleType,
    folder: Path,
    actions: ActionSpace,
    tool: Tool | None,
    *,
    max_rows: int = 16,
    tool_timeout_s: float = 60.0,
) -> RolloutEngine:
    """A rollout engine of `actors.vllm_engine` around the model in a folder."""
    engine: RolloutEngine = ours.VLLMEngine(
        LMConfig(model=str(folder), device="cpu"),
        actions,
        tool,
        lora=LoRAConfig(rank=8),
        max_rows=max_rows,
        tool_timeout_s=tool_timeout_s,
        longest_prompt=8,
        seed=0,
    )
    return engine
