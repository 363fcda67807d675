"""A tabular policy over strings that can all be enumerated, for the tests of the objectives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from learner.objectives.base import Objective, ObjectiveInput

STOP = 2  # column of the stop action, after the tokens 0 and 1
TOOL = 7  # what the tool inserts, at once, behind every token 1

Prefix = tuple[int, ...]


def loss_of(batch: ObjectiveInput, objective: Objective) -> Tensor:
    """The objective's loss, normalised."""
    total = objective(batch).total
    return total / objective.weight(batch.stop_BS).to(total)


def total_variation(log_p_N: Tensor, log_q_N: Tensor) -> float:
    return (log_p_N.exp() - log_q_N.exp()).abs().sum().item() / 2


@dataclass(frozen=True, eq=False)
class Toy:
    """All strings of min_len to max_len tokens, each with a random reward.

    With a tool, its text counts as length and may overshoot max_len. The policy has a row of
    logits [token 0, token 1, stop] for every prefix in which it acts.
    """

    min_len: int
    max_len: int
    prefixes: list[Prefix]  # those in which the policy acts
    log_reward: dict[Prefix, float]
    tool: bool
    strings: list[Prefix] = field(init=False)
    _tables: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strings", list(self.log_reward))
        object.__setattr__(self, "_tables", self._tabulate())

    def batch(
        self, logits_N3: Tensor, rows: Sequence[int], log_z: Tensor | None = None
    ) -> ObjectiveInput:
        """The chosen strings under the policy with these logits, padded with NaN."""
        token_NT, state_NS, stop_NS, log_reward_NS = (table[rows] for table in self._tables)
        log_q_N3 = self.masked(logits_N3).log_softmax(1)
        log_pf_BT = log_q_N3[state_NS[:, :-1], token_NT.clamp(min=0)]
        return ObjectiveInput(
            log_pf_BT=torch.where(token_NT >= 0, log_pf_BT, 0.0),
            log_stop_BS=torch.where(stop_NS, log_q_N3[state_NS, STOP], torch.nan),
            log_reward_BS=log_reward_NS,
            stop_BS=stop_NS,
            group_B=torch.zeros(len(rows), dtype=torch.long),
            log_z_B=None if log_z is None else log_z.expand(len(rows)),
        )

    def masked(self, logits_N3: Tensor) -> Tensor:
        length_N = torch.tensor([len(prefix) for prefix in self.prefixes])
        barred_N3 = torch.zeros_like(logits_N3, dtype=torch.bool)
        barred_N3[:, STOP] = length_N < self.min_len
        barred_N3[:, :STOP] = (length_N >= self.max_len)[:, None]
        return logits_N3.masked_fill(barred_N3, -math.inf)

    @property
    def log_z(self) -> Tensor:
        return torch.tensor([*self.log_reward.values()], dtype=torch.float64).logsumexp(0)

    def log_posterior(self) -> Tensor:
        return torch.tensor([*self.log_reward.values()], dtype=torch.float64).log_softmax(0)

    def log_policy(self, logits_N3: Tensor) -> Tensor:
        """Exact log-probability of every string."""
        batch = self.batch(logits_N3, range(len(self.strings)))
        last_N1 = torch.tensor([[len(string)] for string in self.strings])
        return batch.log_pf_BT.sum(1) + batch.log_stop_BS.gather(1, last_N1).squeeze(1)

    def optimal_logits(self) -> Tensor:
        """logit of a token = log flow of the child, of stop = log R."""

        @cache
        def log_flow(prefix: Prefix) -> float:
            here = [self.log_reward[prefix]] if prefix in self.log_reward else []
            below = [log_flow(child) for child in self.children(prefix)]
            return torch.tensor(here + below, dtype=torch.float64).logsumexp(0).item()

        rows = []
        for prefix in self.prefixes:
            below = [log_flow(child) for child in self.children(prefix)] or [0.0, 0.0]
            rows.append([*below, self.log_reward.get(prefix, 0.0)])
        return torch.tensor(rows, dtype=torch.float64)

    def children(self, prefix: Prefix) -> list[Prefix]:
        if len(prefix) >= self.max_len:
            return []
        return [(*prefix, 0), (*prefix, 1, TOOL) if self.tool else (*prefix, 1)]

    def _tabulate(self) -> tuple[Tensor, ...]:
        """Of every string: tokens (-1 for none of the policy's), prefixes, stop states, rewards."""
        shape = len(self.strings), max(map(len, self.strings)) + 1
        token_NT = torch.full((shape[0], shape[1] - 1), -1)
        state_NS = torch.zeros(shape, dtype=torch.long)
        stop_NS = torch.zeros(shape, dtype=torch.bool)
        log_reward_NS = torch.full(shape, torch.nan, dtype=torch.float64)
        index = {prefix: number for number, prefix in enumerate(self.prefixes)}
        for row, string in enumerate(self.strings):
            for t in range(len(string) + 1):
                state_NS[row, t] = index.get(string[:t], 0)
                if t < len(string) and string[t] != TOOL:
                    token_NT[row, t] = string[t]
                if string[:t] in self.log_reward:
                    stop_NS[row, t] = True
                    log_reward_NS[row, t] = self.log_reward[string[:t]]
        return token_NT, state_NS, stop_NS, log_reward_NS


def make_toy(min_len: int, *, max_len: int = 3, tool: bool = False) -> Toy:
    generator = torch.Generator().manual_seed(7)
    prefixes: list[Prefix] = [()]
    for prefix in prefixes:  # grows as it is read: breadth first
        if len(prefix) < max_len:
            prefixes += [(*prefix, 0), (*prefix, 1, TOOL) if tool else (*prefix, 1)]
    log_reward = {
        prefix: 2 * torch.randn((), generator=generator).item() - 30
        for prefix in prefixes
        if len(prefix) >= min_len
    }
    return Toy(min_len, max_len, prefixes, log_reward, tool)
