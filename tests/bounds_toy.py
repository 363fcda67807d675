"""A posterior that brute force knows: strings over four tokens, policy and frozen LM at random."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from actors.engine import NativeEngine
from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.config import LoRAConfig
from lm.model import LanguageModel
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem
from tasks.posterior.weights import Completed
from tests.naive_rewards import naive_log_rewards

STOP, TRIGGER, OUTSIDE = 0, 3, 5
LEGAL = (1, 2, TRIGGER, 4)
VOCAB_SIZE = 6


class Parrot:
    """Behind TRIGGER it says two tokens; the longer the text, the others."""

    triggers = frozenset({TRIGGER})

    def output(self, completion: Sequence[int]) -> list[int]:
        return [OUTSIDE, 1 + len(completion) % 2]


def make_lm(seed: int) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    return model


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One prompt with its actions, and everything that can be said of it exactly."""

    actions: ActionSpace
    tool: Parrot | None
    prompt: Prompt
    query: RewardQuery
    frozen: PreTrainedModel
    policy_model: PreTrainedModel

    def policy(self, seed: int) -> NativeEngine:
        language_model = LanguageModel(model=self.policy_model, tokenizer=None, fingerprint="toy")
        return NativeEngine(
            language_model, self.actions, self.tool, lora=LoRAConfig(), max_rows=256, seed=seed
        )

    def log_reward(self, items: Sequence[ScoreItem]) -> list[NDArray[np.float32]]:
        return suffix_log_rewards(self.frozen, items, 16384)

    def strings(self) -> list[Completed]:
        """Every legal completion, by trying all sequences of choices."""
        found: dict[Completed, None] = {}
        for length in range(self.actions.max_len + 1):
            for choices in itertools.product(LEGAL, repeat=length):
                if (string := self._follow(choices)) is not None:
                    found[string] = None
        return list(found)

    def _follow(self, choices: Sequence[int]) -> Completed | None:
        tokens: list[int] = []
        marks: list[bool] = []
        for choice in choices:
            if len(tokens) >= self.actions.max_len:
                return None
            tokens.append(choice)
            said = self.tool.output(tokens) if self.tool and choice == TRIGGER else []
            marks += [False] + [True] * len(said)
            tokens += said
        if len(tokens) < self.actions.min_len:
            return None
        return Completed(tokens=tuple(tokens), from_tool=tuple(marks))

    def log_r(self) -> NDArray[np.float64]:
        """log p_LM(Z Y | X) of every string, by separate passes."""
        items = [
            self.query.item(self.prompt, s.tokens, np.array([len(s.tokens)], dtype=np.int32))
            for s in self.strings()
        ]
        return np.concatenate(naive_log_rewards(self.frozen, items)).astype(np.float64)

    def log_q(self) -> NDArray[np.float64]:
        """log q(Z ⊤ | X) of every string, one state after the other."""
        return np.array([self._log_q(string) for string in self.strings()])

    @torch.no_grad()
    def _log_q(self, string: Completed) -> float:
        total = 0.0
        for t in range(len(string.tokens) + 1):
            if t < len(string.tokens) and string.from_tool[t]:
                continue
            if t >= self.actions.max_len:
                continue
            ids = torch.tensor([[*self.prompt.prompt, *string.tokens[:t]]])
            logits = self.policy_model(input_ids=ids).logits[0, -1].double()
            open_ = [*LEGAL, STOP] if t >= self.actions.min_len else list(LEGAL)
            action = string.tokens[t] if t < len(string.tokens) else STOP
            total += float(logits[action] - logits[open_].logsumexp(0))
        return total


def make_toy(
    *,
    tool: bool = False,
    min_len: int = 0,
    max_len: int = 3,
    answer: tuple[int, ...] = (OUTSIDE,),
    context: tuple[int, ...] = (4, 2),
    **changes: Any,
) -> Toy:
    fields: dict[str, Any] = {
        "actions": ActionSpace(
            stop_token=STOP, legal_tokens=LEGAL, min_len=min_len, max_len=max_len
        ),
        "tool": Parrot() if tool else None,
        "prompt": Prompt(key="k", text="x", prompt=(5, 1), answer=answer),
        "query": RewardQuery(kind="suffix", stop_token=STOP, context=context),
        "frozen": make_lm(7),
        "policy_model": make_lm(4),
    }
    return Toy(**(fields | changes))


def normalised(log_weight_N: NDArray[np.float64]) -> NDArray[np.float64]:
    weight_N = np.exp(log_weight_N - log_weight_N.max())
    return weight_N / weight_N.sum()


def log_sum(log_weight_N: NDArray[np.float64]) -> float:
    return float(np.logaddexp.reduce(log_weight_N))
