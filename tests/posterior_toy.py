"""Completions of a tiny language model by brute force, for the tests of the exact posterior."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.next_action import NextLogits
from lm.tools import TriggerText
from tasks.posterior.ceiling import PriorCeiling
from tasks.posterior.enumeration import PrefixTree
from tests.naive_rewards import naive_log_rewards
from tests.sampling_toy import enumerable_policy

STOP, CALL, VOCAB_SIZE = 0, 3, 6
Tokens = tuple[int, ...]


@functools.cache
def shared_model() -> PreTrainedModel:
    """Random weights, the same for all; never changed."""
    return enumerable_policy()[0].requires_grad_(False)


class Doubling:
    """Behind CALL it inserts two tokens, one of them CALL itself; after [CALL] alone, nothing."""

    triggers = frozenset({CALL})

    def output(self, completion: Sequence[int]) -> list[int]:
        return [CALL, 4 + len(completion) % 2] if len(completion) > 1 else []

    def is_called(self, tokens: Sequence[int], marks: Sequence[bool]) -> bool:
        """Whether the newest token, which the policy chose, calls it."""
        return tokens[-1] == CALL


class Magic:
    """Called by "aba", which is spelled by three tokens, or by two, of which the second goes on.
    Says nothing, half of that, or all, as the length has it."""

    PIECES = ("", "a", "b", "ba.", "", "")

    def __init__(self) -> None:
        self.triggers = TriggerText(self, "aba")

    def __len__(self) -> int:
        return len(self.PIECES)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [5]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.PIECES[token] for token in token_ids)

    def output(self, completion: Sequence[int]) -> list[int]:
        return ([1, 2], [3], [1], [])[len(completion) % 4]

    def is_called(self, tokens: Sequence[int], marks: Sequence[bool]) -> bool:
        """By hand, a character at a time."""
        text, calls = "", False
        for token, inserted in zip(tokens, marks, strict=True):
            text, calls = "" if inserted else text, False
            for character in "" if inserted else self.PIECES[token]:
                text += character
                calls |= text.endswith("aba")
        return calls


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One prompt of a task on six tokens; legal are 1, 2, CALL (and 4 where `wide`)."""

    min_len: int = 0
    max_len: int = 4
    tool: Doubling | Magic | None = None
    stop_after_tool: bool = False
    stop_behind: frozenset[int] | None = None
    stop_every: int = 1
    answer: Tokens = (5,)
    context: Tokens = ()
    wide: bool = False

    @property
    def model(self) -> PreTrainedModel:
        return shared_model()

    @property
    def actions(self) -> ActionSpace:
        return ActionSpace(
            stop_token=STOP,
            legal_tokens=(1, 2, CALL, 4) if self.wide else (1, 2, CALL),
            min_len=self.min_len,
            max_len=self.max_len,
            stop_after_tool=self.stop_after_tool,
            stop_behind=self.stop_behind,
            stop_every=self.stop_every,
        )

    @property
    def prompt(self) -> Prompt:
        return Prompt(key="toy", text="toy", prompt=(5, 2), answer=self.answer)

    @property
    def query(self) -> RewardQuery:
        return RewardQuery(kind="suffix", stop_token=STOP, context=self.context)

    def completions(self) -> dict[Tokens, tuple[bool, ...]]:
        """Every completion with its tool marks: all choices in all orders, simulated."""
        found = {}
        for length in range(self.max_len + 1):
            for choices in itertools.product(self.actions.legal_tokens or (), repeat=length):
                for tokens, marks in self._simulated(choices):
                    found[tokens] = marks
        return found

    def _simulated(self, choices: Tokens) -> Iterator[tuple[Tokens, tuple[bool, ...]]]:
        tokens: list[int] = []
        marks: list[bool] = []
        for choice in choices:
            if len(tokens) >= self.max_len:
                return
            tokens.append(choice)
            marks.append(False)
            if self.tool is not None and self.tool.is_called(tokens, marks):
                said = self.tool.output(tokens)
                tokens += said
                marks += [True] * len(said)
        if len(tokens) >= self.max_len or self._open(tokens, marks):
            yield tuple(tokens), tuple(marks)

    def _open(self, tokens: Sequence[int], marks: Sequence[bool]) -> bool:
        """Whether ⊤ competes with tokens behind these."""
        if len(tokens) < self.min_len or (len(tokens) - self.min_len) % self.stop_every:
            return False
        if self.stop_after_tool and not (marks and marks[-1]):
            return False
        return self.stop_behind is None or bool(tokens and tokens[-1] in self.stop_behind)

    def log_q(self, tokens: Tokens, marks: tuple[bool, ...]) -> float:
        """log q(Z ⊤ | X) by one plain forward for each choice."""
        total = 0.0
        for t, token in enumerate((*tokens, STOP)):
            if t < len(tokens) and marks[t]:
                continue
            if t >= self.max_len:
                break
            may_stop = self._open(tokens[:t], marks[:t])
            open_actions = [*(self.actions.legal_tokens or ()), *([STOP] if may_stop else [])]
            with torch.no_grad():
                text = torch.tensor([[*self.prompt.prompt, *tokens[:t]]])
                logits = self.model(text).logits[0, -1].double()[open_actions]
            total += float(logits.log_softmax(0)[open_actions.index(token)])
        return total

    def log_rewards(self, completions: Sequence[Tokens]) -> NDArray[np.float64]:
        """Untempered, each by a pass of its own."""
        return np.array([self._log_reward(z) for z in completions])

    @functools.cache  # noqa: B019 - a handful of toys, kept as long as the tests run
    def _log_reward(self, completion: Tokens) -> float:
        stops = np.array([len(completion)], dtype=np.int32)
        item = self.query.item(self.prompt, completion, stops)
        return float(naive_log_rewards(self.model, [item])[0][-1])

    def log_z(self, temperature: float = 1.0) -> float:
        return float(np.logaddexp.reduce(self.log_rewards([*self.completions()]) / temperature))

    def ceiling(self, temperature: float = 1.0) -> PriorCeiling:
        return PriorCeiling(
            NextLogits(self.model),
            self.actions,
            context=(*self.context, *self.prompt.prompt),
            first_scored=self.answer[0],
            temperature=temperature,
        )

    def tree(
        self,
        *policies: NextLogits,
        max_nodes: int = 10_000,
        bounded: bool = True,
        temperature: float = 1.0,
    ) -> PrefixTree:
        """Under the base model, unless other policies are given."""
        return PrefixTree(
            self.prompt.prompt,
            self.actions,
            self.tool,
            policies or (NextLogits(self.model),),
            self.ceiling(temperature) if bounded else None,
            vocab_size=VOCAB_SIZE,
            max_nodes=max_nodes,
        )


class Optimum(NextLogits):
    """The policy that samples the posterior: log q = log flow of the child - log flow of the node,
    the flow of a node being the reward of all completions that begin with it."""

    def __init__(self, toy: Toy) -> None:
        completions = toy.completions()
        self._toy = toy
        self._reward = dict(zip(completions, np.exp(toy.log_rewards([*completions])), strict=True))

    def action_log_probs(
        self, actions: ActionSpace, prefixes: Sequence[Tokens], may_stop: Sequence[bool]
    ) -> torch.Tensor:
        start = len(self._toy.prompt.prompt)
        columns = actions.columns(VOCAB_SIZE).tolist()
        rows = []
        for prefix, may in zip(prefixes, may_stop, strict=True):
            z = prefix[start:]
            flows = [self._reward.get(z, 0.0) if may else 0.0] + [
                self._flow((*z, token)) for token in columns if token != STOP
            ]
            total = sum(flows)
            rows.append([math.log(f / total) if f else -math.inf for f in flows])
        return torch.tensor(rows, dtype=torch.float64)

    def _flow(self, prefix: Tokens) -> float:
        return sum(r for z, r in self._reward.items() if z[: len(prefix)] == prefix)
