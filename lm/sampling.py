"""Completions sampled from the policy in batches, with a tool in the loop."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.action_distribution import ActionDistribution
from lm.actions import NO_TOKEN, ActionSpace
from lm.cache import SlotCache, decode_step
from lm.model import context_limit, require_context, text_prefix_of, vocab_size
from lm.prefill import Prefill, PromptStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion wanted.

    Raises ValueError for an empty prompt, a temperature <= 0 or a top_p outside (0, 1].
    """

    prompt: tuple[int, ...]
    temperature: float = 1.0  # divides the logits of legal tokens and ⊤ alike
    top_p: float = 1.0  # mass of the nucleus, the likeliest actions, that each is drawn from

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("empty prompt: sampling needs at least one token to start from")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """One sampled completion; L tokens, S stop states."""

    tokens: NDArray[np.int32]  # [L], stop token excluded
    from_tool: NDArray[np.bool_]  # [L] inserted by the tool
    log_q_token: NDArray[np.float32]  # [L] nats, at temperature 1; 0 at tool tokens
    stops: NDArray[np.int32]  # [S] prefix lengths where the policy might stop; last == L
    log_q_stop: NDArray[np.float32]  # [S] nats, at temperature 1; 0 where the stop was forced

    @property
    def log_q(self) -> float:
        """log q(Z ⊤ | X), of the completion and its final stop at temperature 1, nats."""
        return float(self.log_q_token.sum(dtype=np.float64)) + float(self.log_q_stop[-1])


class Tool(Protocol):
    """Speaks into a completion after certain tokens."""

    @property
    def triggers(self) -> frozenset[int]:
        """Tokens after which `output` is asked, when the policy has chosen them."""

    def output(self, completion: Sequence[int]) -> list[int]:
        """Tokens to insert after `completion`, which ends with a trigger; [] for none."""


def ask_tool(tool: Tool, tokens: Sequence[int], vocab_size: int) -> list[int]:
    """What a tool inserts after `tokens`; raises ValueError for what the model cannot read."""
    output = list(tool.output(tuple(tokens)))
    if not all(0 <= token < vocab_size for token in output):
        raise ValueError(f"tool inserted tokens {output}, outside the vocabulary of {vocab_size}")
    return output


@dataclass(slots=True, eq=False)
class Row:
    """A completion in the making."""

    index: int
    request: Request
    prompt: tuple[int, ...]  # with what stands in front of every text
    tokens: list[int] = field(default_factory=list)
    from_tool: list[bool] = field(default_factory=list)
    log_q: list[float] = field(default_factory=list)
    log_stop: list[float] = field(default_factory=list)  # of every stop state passed so far
    pending: list[int] = field(default_factory=list)  # tool output not yet inserted

    @property
    def position(self) -> int:
        """Of the newest token, in prompt and completion."""
        return len(self.prompt) + len(self.tokens) - 1

    def append(self, token: int, log_q: float, *, from_tool: bool) -> None:
        self.tokens.append(token)
        self.log_q.append(log_q)
        self.from_tool.append(from_tool)

    def may_stop(self, actions: ActionSpace) -> bool:
        """Whether ⊤ is open in the present state, unless a tool is speaking."""
        newest = self.tokens[-1] if self.tokens else NO_TOKEN
        after_tool = bool(self.from_tool) and self.from_tool[-1]
        return bool(actions.may_stop(len(self.tokens), newest, after_tool))

    def completion(self, actions: ActionSpace) -> Completion:
        return Completion(
            tokens=np.array(self.tokens, dtype=np.int32),
            from_tool=np.array(self.from_tool, dtype=np.bool_),
            log_q_token=np.array(self.log_q, dtype=np.float32),
            stops=actions.stop_positions(self.tokens, self.from_tool),
            log_q_stop=np.array(self.log_stop, dtype=np.float32),
        )


class Sampler:
    """Draws completions with a KV cache shared by up to `max_rows` rows.

    Equal prompts are prefilled once. A row that ends makes place for a waiting request, or the
    batch shrinks. Rows never see each other. `model` is a causal LM of transformers, with or
    without adapter; its weights must not change during a call of `sample`, and may between calls.
    """

    def __init__(
        self, model: nn.Module, actions: ActionSpace, tool: Tool | None, *, max_rows: int
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: need at least one row")
        self._model = model.eval()
        self._actions = actions
        self._tool = tool
        self._triggers = tool.triggers if tool is not None else frozenset()
        self._max_rows = max_rows
        self._cache: SlotCache | None = None
        self._device = next(model.parameters()).device
        self._text_prefix = text_prefix_of(model)
        self._vocab_size, self._context_limit = vocab_size(model), context_limit(model)
        self._distribution = ActionDistribution(actions, self._vocab_size, self._device)

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], generator: torch.Generator) -> list[Completion]:
        """One completion per request, in their order.

        Raises ValueError when a text outgrows the model, PolicyDiverged when logits are NaN.
        """
        done: dict[int, Completion] = {}
        everyone = (
            Row(index, request, (*self._text_prefix, *request.prompt))
            for index, request in enumerate(requests)
        )
        waiting = deque(row for row in everyone if not self._force_stop(row, done))
        rows: list[Row] = []  # rows[i] lives in slot i of the cache
        store = PromptStore(self._model, [row.prompt for row in waiting])
        cache = self._take_cache(waiting)
        logits_NV = torch.empty(0, self._vocab_size, device=self._device)
        while rows or waiting:
            # Prefills are worth batching, so a few empty slots wait for company.
            if waiting and self._max_rows - len(rows) >= max(1, self._max_rows // 8):
                logits_NV = torch.cat([logits_NV, self._admit(rows, waiting, store, cache)])
            self._drop(rows, self._act(rows, logits_NV, generator, done), cache)
            logits_NV = self._decode(rows, cache) if rows else logits_NV[:0]
        self._cache = cache
        return [done[index] for index in range(len(requests))]

    def _take_cache(self, waiting: Sequence[Row]) -> SlotCache:
        """The last call's buffers, if they are large enough: fresh pages are slow to touch.

        Handed back only by a call that ends well, so that no NaN of a diverged policy stays.
        """
        cache, self._cache = self._cache, None
        slots = min(self._max_rows, len(waiting))
        longest = max((len(row.prompt) for row in waiting), default=0)
        columns = longest + self._actions.max_len
        require_context(self._model, columns - len(self._text_prefix))
        if cache is None or cache.slots < slots or cache.columns < columns:
            return SlotCache(slots=slots, columns=columns)
        return cache

    def _admit(
        self, rows: list[Row], waiting: deque[Row], store: PromptStore, cache: SlotCache
    ) -> Tensor:
        """Give free slots to waiting rows; [K, V] logits after their prompts."""
        count = min(self._max_rows - len(rows), len(waiting))
        new = [waiting.popleft() for _ in range(count)]
        admitted: dict[Prefill, list[tuple[Row, int]]] = {}
        for row, (prefill, source) in zip(new, store.take([r.prompt for r in new]), strict=True):
            admitted.setdefault(prefill, []).append((row, source))
        logits = []
        for prefill, pairs in admitted.items():
            slots = torch.arange(len(rows), len(rows) + len(pairs), device=self._device)
            sources = torch.tensor([source for _, source in pairs], device=self._device)
            cache.write(slots, prefill.states, sources)
            logits.append(prefill.logits_UV[sources])
            rows.extend(row for row, _ in pairs)
        return torch.cat(logits)

    def _act(
        self,
        rows: Sequence[Row],
        logits_NV: Tensor,
        generator: torch.Generator,
        done: dict[int, Completion],
    ) -> list[int]:
        """One action per row: a tool's token, a chosen one, or ⊤. Returns the ended slots."""
        may_stop = [row.may_stop(self._actions) for row in rows]
        choice = self._distribution.choose(
            logits_NV,
            may_stop,
            [row.request.temperature for row in rows],
            [row.request.top_p for row in rows],
            generator,
        )
        ended = []
        for slot, row in enumerate(rows):
            if row.pending:
                row.append(row.pending.pop(0), 0.0, from_tool=True)
            else:
                if may_stop[slot]:
                    row.log_stop.append(choice.log_stop[slot])
                if choice.token[slot] == self._actions.stop_token:
                    done[row.index] = row.completion(self._actions)
                    ended.append(slot)
                    continue
                row.append(choice.token[slot], choice.log_q[slot], from_tool=False)
                if self._tool is not None and row.tokens[-1] in self._triggers:
                    row.pending = ask_tool(self._tool, row.tokens, self._vocab_size)
            if self._force_stop(row, done):
                ended.append(slot)
        return ended

    def _force_stop(self, row: Row, done: dict[int, Completion]) -> bool:
        """End `row` when nothing but ⊤ is left to it."""
        if row.pending or not self._actions.must_stop(len(row.tokens)):
            return False
        row.log_stop.append(0.0)
        done[row.index] = row.completion(self._actions)
        return True

    def _drop(self, rows: list[Row], ended: Sequence[int], cache: SlotCache) -> None:
        """Close the gaps that ended rows leave with the last live rows; keeps rows in slots 0.."""
        left = len(rows) - len(ended)
        holes = [slot for slot in ended if slot < left]
        movers = sorted(set(range(left, len(rows))) - set(ended))
        if holes:
            cache.move(
                torch.tensor(movers, device=self._device), torch.tensor(holes, device=self._device)
            )
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
        del rows[left:]

    def _decode(self, rows: Sequence[Row], cache: SlotCache) -> Tensor:
        """Feed every row's newest token; [N, V] logits for its next action."""
        positions = [row.position for row in rows]
        longest = max(positions) + 1 - len(self._text_prefix)
        if longest > self._context_limit:  # a tool wrote past max_len
            require_context(self._model, longest)
        return decode_step(self._model, cache, [row.tokens[-1] for row in rows], positions)
