"""Completions sampled from the policy, many rows at a time, with a tool in the loop."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.action_distribution import ActionDistribution
from lm.actions import NO_TOKEN, ActionSpace
from lm.cache import BLOCK, SlotCache, decode_step
from lm.model import require_context, text_prefix_of, vocab_size
from lm.prefill import Prefill, PromptStore, kept_prompts
from lm.tools import (
    Tool,
    ToolCall,
    ToolDesk,
    ToolFault,
    drawn_again,
    unfailing,
    wait_for_any,
)


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


# The number of a request, and what it ended with.
Ended = tuple[int, Completion | ToolFault]


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
    call: ToolCall | None = None  # of a tool that has not been heard yet

    @property
    def position(self) -> int:
        """Of the newest token, in prompt and completion."""
        return len(self.prompt) + len(self.tokens) - 1

    def append(self, token: int, log_q: float, *, from_tool: bool) -> None:
        self.tokens.append(token)
        self.log_q.append(log_q)
        self.from_tool.append(from_tool)

    def hear(self, model: nn.Module) -> ToolFault | None:
        """Take what the tool says into `pending`; why the row ends, where it says nothing that
        `model` could read."""
        assert self.call is not None
        try:
            self.pending, self.call = self.call.result(), None
            written = len(self.request.prompt) + len(self.tokens) + len(self.pending)
            require_context(model, written)
        except Exception as error:  # whatever the tool raised
            return ToolFault(error)
        return None

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

    A row that ends makes place for a waiting request, whichever call that came with. Prompts that
    are asked again are not read again. Rows never see each other. `model` is a causal LM of
    transformers, with or without adapter; its weights may change while nothing is under way.

    Args:
        steady: all wait for a row's tool, and prompts are read anew whenever nothing is under way,
            so that draws depend on the seed alone. Else a row whose tool is slow gives up its
            place, and takes another when the tool has spoken.
        tool_timeout_s: longest wait for a tool.
    """

    def __init__(
        self,
        model: nn.Module,
        actions: ActionSpace,
        tool: Tool | None,
        *,
        max_rows: int,
        steady: bool = True,
        tool_timeout_s: float = 600.0,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: need at least one row")
        self._model = model.eval()
        self._actions = actions
        self._max_rows, self._steady = max_rows, steady
        self._device = next(model.parameters()).device
        self._text_prefix = text_prefix_of(model)
        self._vocab_size = vocab_size(model)
        self._distribution = ActionDistribution(actions, self._vocab_size, self._device)
        self._desk: ToolDesk | None = None
        if tool is not None:
            self._desk = ToolDesk(tool, vocab_size=self._vocab_size, timeout_s=tool_timeout_s)
        self._store = PromptStore(self._model, max_prompts=kept_prompts(max_rows))
        self._numbers = itertools.count()
        self._cache: SlotCache | None = None
        self.abort()

    def abort(self) -> None:
        """Give up all that is under way."""
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []  # rows[i] lives in slot i of the cache
        self._parked: list[tuple[Row, Prefill]] = []  # without a slot while their tool thinks
        self._logits_NV = torch.empty(0, self._vocab_size, device=self._device)
        self._ended: list[Ended] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._waiting or self._rows or self._parked or self._ended)

    def forget_prompts(self) -> None:
        """The weights have changed: read every prompt anew."""
        assert self.idle, "weights must not change while completions are under way"
        self._store.clear()

    def sample(self, requests: Sequence[Request], generator: torch.Generator) -> list[Completion]:
        """As `attempt`, all of them; raises what a tool raised where it ended one twice."""
        return unfailing(self.attempt(requests, generator))

    def attempt(
        self,
        requests: Sequence[Request],
        generator: torch.Generator,
        progress: Callable[[int], None] = lambda ended: None,
    ) -> list[Completion | ToolFault]:
        """`drawn_again`, while nothing else is under way; gives all up where it raises."""
        try:
            return drawn_again(requests, self.submit, partial(self.step, generator), progress)
        except BaseException:
            self.abort()
            raise

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Let requests wait for places; their numbers.

        Raises ValueError when a text would outgrow the model.
        """
        if self._steady and self.idle:  # the same again, whatever was asked before
            self._store.clear()
        longest = max((len(request.prompt) for request in requests), default=0)
        require_context(self._model, longest + self._actions.max_len)
        rows = [
            Row(number, request, (*self._text_prefix, *request.prompt))
            for request, number in zip(requests, self._numbers, strict=False)
        ]
        self._waiting.extend(row for row in rows if not self._force_stop(row))
        return [row.index for row in rows]

    @torch.inference_mode()
    def step(self, generator: torch.Generator) -> list[Ended]:
        """Another token of every row that has a place; what has ended, by number of its request.

        Raises PolicyDiverged when log q is not finite, and gives up what was under way.
        """
        try:
            self._admit()
            if self._parked and not self._rows:
                wait_for_any([row.call for row, _ in self._parked if row.call])
            if self._rows:
                self._drop(self._act(generator))
                self._logits_NV = self._decode() if self._rows else self._logits_NV[:0]
        except BaseException:
            self.abort()
            self._cache = None  # no NaN of a diverged policy stays
            raise
        ended, self._ended = self._ended, []
        return ended

    def _admit(self) -> None:
        """Give free slots to rows whose tool has spoken, and to waiting ones."""
        heard = [pair for pair in self._parked if pair[0].call is None or pair[0].call.over]
        self._parked = [pair for pair in self._parked if pair not in heard]
        self._place([(row, prefill, 0) for row, prefill in heard])
        free = self._max_rows - len(self._rows) - len(self._parked)
        # Prompts are worth reading together, so a few empty slots wait for company.
        known = bool(self._waiting) and self._waiting[0].prompt in self._store
        if free < (1 if known else max(1, self._max_rows // 8)):
            return
        while new := self._next(self._max_rows - len(self._rows) - len(self._parked)):
            taken = self._store.take([row.prompt for row in new])
            self._place([(row, *place) for row, place in zip(new, taken, strict=True)])

    def _next(self, most: int) -> list[Row]:
        """Waiting rows, at most so many, and of no more prompts than are kept."""
        new: list[Row] = []
        prompts: set[tuple[int, ...]] = set()
        while self._waiting and len(new) < most:
            prompts.add(self._waiting[0].prompt)
            if len(prompts) > self._store.max_prompts:
                break
            new.append(self._waiting.popleft())
        return new

    def _place(self, placed: Sequence[tuple[Row, Prefill, int]]) -> None:
        """Write rows into the next slots, each from its row of a prefill."""
        if not placed:
            return
        longest = max(len(row.prompt) for row, _, _ in placed) + self._actions.max_len
        cache = self._cache
        if cache is None:
            columns = min(longest, max(prefill.width for _, prefill, _ in placed) + BLOCK)
            cache = self._cache = SlotCache(slots=len(placed), columns=columns)
        cache.limit = max(cache.limit, longest)
        of_prefill: dict[Prefill, list[tuple[Row, int]]] = {}
        for row, prefill, source in placed:
            of_prefill.setdefault(prefill, []).append((row, source))
        logits = [self._logits_NV]
        for prefill, pairs in of_prefill.items():
            first = len(self._rows)
            slots = torch.arange(first, first + len(pairs), device=self._device)
            sources = torch.tensor([source for _, source in pairs], device=self._device)
            cache.write(slots, prefill.states, sources)
            logits.append(prefill.logits_UV[sources])
            self._rows.extend(row for row, _ in pairs)
        self._logits_NV = torch.cat(logits)

    def _act(self, generator: torch.Generator) -> list[int]:
        """One action per row: a tool's token, a chosen one, or ⊤. Returns the slots they leave."""
        may_stop = [row.may_stop(self._actions) for row in self._rows]
        choice = self._distribution.choose(
            self._logits_NV,
            may_stop,
            [row.request.temperature for row in self._rows],
            [row.request.top_p for row in self._rows],
            generator,
        )
        left = []
        for slot, row in enumerate(self._rows):
            if row.call is not None and not self._hear(row, slot):
                left.append(slot)
                continue
            if row.pending:
                row.append(row.pending.pop(0), 0.0, from_tool=True)
            else:
                if may_stop[slot]:
                    row.log_stop.append(choice.log_stop[slot])
                if choice.token[slot] == self._actions.stop_token:
                    self._ended.append((row.index, row.completion(self._actions)))
                    left.append(slot)
                    continue
                row.append(choice.token[slot], choice.log_q[slot], from_tool=False)
                if self._desk is not None:
                    row.call = self._desk.ask(row.tokens, row.from_tool)
            if self._force_stop(row):
                left.append(slot)
        return left

    def _hear(self, row: Row, slot: int) -> bool:
        """Take what the tool says to a row; False where that leaves its slot: it has ended, or
        waits elsewhere until the tool has spoken."""
        assert row.call is not None and self._cache is not None
        if not (self._steady or row.call.over):
            states = self._cache.read(slot, row.position + 1)
            self._parked.append((row, Prefill(states, self._logits_NV[slot : slot + 1].clone())))
            return False
        if (fault := row.hear(self._model)) is not None:
            self._ended.append((row.index, fault))
            return False
        return not self._force_stop(row)

    def _force_stop(self, row: Row) -> bool:
        """End `row` when nothing but ⊤ is left to it."""
        if row.pending or row.call or not self._actions.must_stop(len(row.tokens)):
            return False
        row.log_stop.append(0.0)
        self._ended.append((row.index, row.completion(self._actions)))
        return True

    def _drop(self, left: Sequence[int]) -> None:
        """Close the gaps that rows have left with the last live rows; keeps rows in slots 0.."""
        rows, kept = self._rows, len(self._rows) - len(left)
        holes = [slot for slot in left if slot < kept]
        movers = sorted(set(range(kept, len(rows))) - set(left))
        if holes:
            assert self._cache is not None
            self._cache.move(*(torch.tensor(at, device=self._device) for at in (movers, holes)))
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
        del rows[kept:]

    def _decode(self) -> Tensor:
        """Feed every row's newest token; [N, V] logits for its next action."""
        assert self._cache is not None
        newest = [row.tokens[-1] for row in self._rows]
        return decode_step(self._model, self._cache, newest, [row.position for row in self._rows])
