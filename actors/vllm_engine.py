"""Rollouts by vLLM: a paged cache, prompts read once, and places taken again as rows end.

vLLM draws, from what `PolicyLaw` puts in the place of a model's logits: log q / temperature of the
legal tokens and ⊤, closed wherever `ActionSpace` says so. Beside every draw it reports what it drew
from, of the token and of ⊤; times the temperature that is log q at temperature 1.

A row is a request that ends at ⊤, at a token that may call a tool, or at max_len. Behind that, and
what the tool wrote, it goes on as another, of which all that stands there is the prompt. Until the
tool has spoken others take its place.
"""

import itertools
import math
import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.engine import EngineRefused, vllm_cache_bytes
from actors.protocols import RolloutEngine
from lm.action_distribution import ActionDistribution, PolicyDiverged
from lm.actions import NO_TOKEN, ActionSpace
from lm.adapter import AdapterMismatch, unpack_adapter
from lm.config import LMConfig, LoRAConfig
from lm.hub import load_tokenizer
from lm.memory import device_memory_bytes
from lm.model import (
    CausalLM,
    adapted_layers,
    build_without_weights,
    context_limit,
    device_of,
    set_text_prefix,
    vocab_size,
)
from lm.sampling import Completion, Ended, Request, Row
from lm.spelling import text_prefix
from lm.tools import Tool, ToolDesk, wait_for_any

_RANKS = sorted(get_args(MaxLoRARanks))  # that vLLM has kernels for; a smaller one is padded


class _State(NamedTuple):
    """Where a row stands in its completion."""

    begun: int  # tokens of the completion in the request's prompt
    newest: int  # of those the last
    after_tool: bool  # whether a tool inserted it
    temperature: float
    drawn: list[int]  # since then; grows as vLLM draws

    @staticmethod
    def of(params: SamplingParams, prompt: list[int] | None, drawn: list[int]) -> "_State":
        return _State(**params.extra_args, drawn=drawn)


class PolicyLaw(LogitsProcessor):
    """From logits to log q / temperature of every action that is open to each row of a batch."""

    actions: ActionSpace  # of a subclass

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        vocabulary = vllm_config.model_config.get_vocab_size()
        self._distribution = ActionDistribution(self.actions, vocabulary, device)
        self._states: dict[int, _State] = {}  # by the row's place in the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._states, batch_update, _State.of)

    def apply(self, logits_NV: Tensor) -> Tensor:
        states = [self._states[place] for place in range(len(logits_NV))]
        may_stop_N = self.actions.may_stop(
            np.array([state.begun + len(state.drawn) for state in states]),
            np.array([state.drawn[-1] if state.drawn else state.newest for state in states]),
            np.array([state.after_tool and not state.drawn for state in states]),
        )
        log_q_NC = self._distribution.log_q(logits_NV, may_stop_N)
        temperature_N = torch.tensor([state.temperature for state in states])
        log_q_NC = log_q_NC / temperature_N.to(log_q_NC.device)[:, None]
        if self._distribution.every_token:
            return log_q_NC
        closed_NV = torch.full_like(logits_NV, -torch.inf)
        return closed_NV.index_copy_(1, self._distribution.id_C, log_q_NC)


class VLLMEngine(RolloutEngine):
    """A rollout engine (`actors.protocols`) in this process; keeps no weights but vLLM's own.

    Its cache has room for `max_rows` completions behind the longest prompt. Draws follow torch's
    own generator, which is seeded here.
    """

    def __init__(
        self,
        lm: LMConfig,
        actions: ActionSpace,
        tool: Tool | None,
        *,
        lora: LoRAConfig,
        max_rows: int,
        tool_timeout_s: float,
        longest_prompt: int,
        seed: int,
    ) -> None:
        """Raises EngineRefused where vLLM cannot serve the base, or such adapters."""
        self._actions, self._max_rows = actions, max_rows
        self._text_prefix = text_prefix(lm, load_tokenizer(lm))
        self._shape = shape = build_without_weights(lm)
        self._desk: ToolDesk | None = None
        self._ends = [actions.stop_token, *(tool.triggers if tool is not None else ())]
        if tool is not None:
            self._desk = ToolDesk(tool, vocab_size=vocab_size(shape), timeout_s=tool_timeout_s)
        columns = len(self._text_prefix) + longest_prompt + actions.max_len
        self._context = min(max(columns, 2), context_limit(shape))
        set_text_prefix(shape, self._text_prefix)
        if device_of(lm).type != current_platform.device_type:
            raise EngineRefused(
                f"models are to be on {device_of(lm).type} (lm.device), and this vLLM is built "
                f"for {current_platform.device_type}: install its other build, or set lm.device"
            )
        on_cpu = current_platform.device_type == "cpu"
        cache_bytes = vllm_cache_bytes(shape, max_rows=max_rows, columns=columns)
        held_bytes = cache_bytes + sum(parameter.nbytes for parameter in shape.parameters())
        arguments = EngineArgs(
            model=lm.model,
            revision=lm.revision,
            trust_remote_code=lm.trust_remote_code,
            skip_tokenizer_init=True,
            generation_config="vllm",  # nothing of the model's own
            dtype=lm.dtype,
            seed=seed,
            max_model_len=self._context,
            max_num_seqs=max_rows,
            kv_cache_memory_bytes=cache_bytes,
            # All it must find free of a GPU, which others may share with it.
            gpu_memory_utilization=min(1.0, held_bytes / device_memory_bytes(device_of(lm))),
            enable_prefix_caching=True,
            enforce_eager=on_cpu,
            **_adapter_arguments(shape, lora),
            logits_processors=[type("TaskLaw", (PolicyLaw,), {"actions": actions})],
            logprobs_mode="processed_logits",
            async_scheduling=False,  # the law reads the newest token
            disable_log_stats=True,
        )
        self._engine = _started(arguments)
        self._folder = TemporaryDirectory(prefix="amortize-adapter-")
        self._adapter: LoRARequest | None = None
        self._request_ids = itertools.count()
        self._rows: dict[str, Row] = {}  # by the request that writes at them now
        self._waiting: deque[Row] = deque()
        self._parked: list[Row] = []  # until their tool has spoken
        self._numbers = itertools.count()

    def load(self, adapter: bytes) -> None:
        """Take up an adapter from `lm.adapter.adapter_bytes`, while nothing is under way.

        Raises AdapterMismatch.
        """
        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
        folder = Path(self._folder.name) / str(number)
        unpack_adapter(adapter, folder)
        # Under a name of its own: what the cache holds of prompts was read with the one before.
        request = LoRARequest(f"version-{number}", number, str(folder))
        try:
            self._engine.add_lora(request)
        except Exception as error:  # of its checks of names, shapes and ranks each has its own
            raise AdapterMismatch(f"vLLM does not take this adapter: {_one_line(error)}") from error
        if self._adapter is not None:
            shutil.rmtree(self._adapter.lora_path)
        self._adapter = request

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """See `RolloutEngine`; what this engine has no law or no room for `poll` finds."""
        prefix = self._text_prefix
        rows = [Row(next(self._numbers), asked, (*prefix, *asked.prompt)) for asked in requests]
        self._waiting.extend(rows)
        return [row.index for row in rows]

    def poll(self) -> list[Ended]:
        """A step of vLLM's, once the free places are taken; where all wait for tools, a moment.

        Raises ValueError for what this engine has no room or no law for, PolicyDiverged when
        log q is not finite, and gives up what was under way.
        """
        if self._parked and not (self._rows or self._waiting):
            wait_for_any([row.call for row in self._parked if row.call])
        ended = self._hear()
        try:
            while len(self._rows) < self._max_rows and self._waiting:
                row = self._waiting.popleft()
                if (completion := self._go_on(row)) is not None:
                    ended.append((row.index, completion))
            for output in self._engine.step() if self._rows else ():
                row = self._rows.pop(output.request_id)
                completion = self._took(row, output.outputs[0])
                if completion is None and row.call is not None:
                    self._parked.append(row)
                elif (completion := completion or self._go_on(row)) is not None:
                    ended.append((row.index, completion))
        except BaseException:
            self._engine.abort_request(list(self._rows))
            for under_way in (self._rows, self._waiting, self._parked):
                under_way.clear()
            raise
        return ended

    def _hear(self) -> list[Ended]:
        """Let rows whose tool has spoken be the next to take places; what their tools ended."""
        ended: list[Ended] = []
        heard = [row for row in self._parked if row.call is None or row.call.over]
        self._parked = [row for row in self._parked if row not in heard]
        for row in reversed(heard):
            if (fault := row.hear(self._shape)) is not None:
                ended.append((row.index, fault))
                continue
            while row.pending:
                row.append(row.pending.pop(0), 0.0, from_tool=True)
            self._waiting.appendleft(row)
        return ended

    def _go_on(self, row: Row) -> Completion | None:
        """Ask vLLM for the next tokens of a row, unless nothing but ⊤ is left to it."""
        if self._actions.must_stop(len(row.tokens)):
            row.log_stop.append(0.0)
            return row.completion(self._actions)
        if row.request.top_p != 1:
            raise ValueError(f"top_p {row.request.top_p}: actors.engine 'vllm' samples with 1 only")
        if (columns := len(row.prompt) + self._actions.max_len) > self._context:
            raise ValueError(
                f"a text of {columns} tokens exceeds the {self._context} that this engine has "
                "room for: its longest prompt and max_len, or the model's context"
            )
        state = {
            "begun": len(row.tokens),
            "newest": row.tokens[-1] if row.tokens else NO_TOKEN,
            "after_tool": bool(row.from_tool) and row.from_tool[-1],
            "temperature": row.request.temperature,
        }
        parameters = SamplingParams(
            temperature=1.0,  # the law's business
            max_tokens=self._actions.max_len - len(row.tokens),
            stop_token_ids=self._ends,
            ignore_eos=True,
            logprob_token_ids=[self._actions.stop_token],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=state,
        )
        name = str(next(self._request_ids))
        prompt: Any = {"prompt_token_ids": [*row.prompt, *row.tokens]}
        self._rows[name] = row
        self._engine.add_request(name, prompt, parameters, lora_request=self._adapter)
        return None

    def _took(self, row: Row, output: Any) -> Completion | None:
        """Write down what vLLM drew, and ask the tool that is called; the completion behind ⊤."""
        temperature, stop = row.request.temperature, self._actions.stop_token
        for token, reported in zip(output.token_ids, output.logprobs, strict=True):
            log_q = temperature * reported[token].logprob
            if not math.isfinite(log_q):
                raise PolicyDiverged(
                    f"log q of a token that vLLM sampled is {log_q}: the weights diverged; lower "
                    "the learning rate and resume from an earlier checkpoint"
                )
            if row.may_stop(self._actions):
                row.log_stop.append(temperature * reported[stop].logprob)
            if token == stop:
                return row.completion(self._actions)
            row.append(token, log_q, from_tool=False)
        if self._desk is not None:
            row.call = self._desk.ask(row.tokens, row.from_tool)
        return None


def _adapter_arguments(shape: CausalLM, lora: LoRAConfig) -> dict[str, Any]:
    """Of EngineArgs; layers that no adapter changes stay as fast and small as they are."""
    rank = next((rank for rank in _RANKS if rank >= lora.rank), None)
    if rank is None:
        raise EngineRefused(
            f"lora.rank = {lora.rank}: vLLM serves ranks up to {_RANKS[-1]}; lower it, or set "
            'actors.engine = "native"'
        )
    adapted = adapted_layers(shape, lora)
    ends = {layer.rpartition(".")[-1] for layer in adapted}
    targets = None if isinstance(adapted, str) else sorted(ends)
    return {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": targets}


def _started(arguments: EngineArgs) -> LLMEngine:
    """The engine in this process; raises EngineRefused with what vLLM says against it."""
    try:
        engine = LLMEngine.from_engine_args(arguments)
        # Only a draw finds out whether there are kernels for the shape of the model.
        start = {"begun": 0, "newest": NO_TOKEN, "after_tool": False, "temperature": 1.0}
        trial = SamplingParams(max_tokens=1, detokenize=False, extra_args=start)
        engine.add_request("trial", {"prompt_token_ids": [0]}, trial)
        while engine.has_unfinished_requests():
            engine.step()
        return engine
    except Exception as error:  # architectures, kernels and memory: each of its parts has its own
        raise EngineRefused(
            f'actors.engine = "vllm" cannot serve model {arguments.model!r} with adapters: '
            f'{_one_line(error)}; set actors.engine = "native", or take another base'
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
