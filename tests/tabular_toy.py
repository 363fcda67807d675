"""A tabular policy over strings that can all be enumerated, for the tests of the objectives."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objective import Objective, ObjectiveInput

STOP = 2  # column of the stop action, after the tokens 0 and 1


def loss_of(batch: ObjectiveInput, objective: Objective) -> Tensor:
    """The objective's loss, normalised."""
    total = objective(batch).total
    return total / objective.weight(batch.stop_BS).to(total)


@dataclass(frozen=True)
class Toy:
    """All binary strings of min_len to max_len tokens, with a random reward; enumerable."""

    min_len: int
    max_len: int
    strings: list[tuple[int, ...]]
    log_reward: dict[tuple[int, ...], float]
    prefixes: list[tuple[int, ...]]

    def batch(self, logits_N3: Tensor, rows: list[int]) -> ObjectiveInput:
        """The chosen strings under a tabular policy with logits [prefix, token 0, 1, stop]."""
        log_q_N3 = self.masked(logits_N3).log_softmax(1)
        index = {prefix: number for number, prefix in enumerate(self.prefixes)}
        log_pf_BT = logits_N3.new_zeros(len(rows), self.max_len)
        log_stop_BS = logits_N3.new_zeros(len(rows), self.max_len + 1)
        log_reward_BS = torch.zeros_like(log_stop_BS)
        stop_BS = torch.zeros_like(log_stop_BS, dtype=torch.bool)
        places: list[tuple[int, int, int, int]] = []
        stops: list[tuple[int, int, int]] = []
        for row, number in enumerate(rows):
            string = self.strings[number]
            places += [(row, t, index[string[:t]], token) for t, token in enumerate(string)]
            for t in range(self.min_len, len(string) + 1):
                stops.append((row, t, index[string[:t]]))
                log_reward_BS[row, t] = self.log_reward[string[:t]]
        row_K, t_K, prefix_K, token_K = torch.tensor(places).reshape(-1, 4).T
        log_pf_BT = log_pf_BT.index_put((row_K, t_K), log_q_N3[prefix_K, token_K])
        row_K, t_K, prefix_K = torch.tensor(stops).T
        log_stop_BS = log_stop_BS.index_put((row_K, t_K), log_q_N3[prefix_K, STOP])
        stop_BS[row_K, t_K] = True
        group_B = torch.zeros(len(rows), dtype=torch.long)
        return ObjectiveInput(log_pf_BT, log_stop_BS, log_reward_BS, stop_BS, group_B)

    def masked(self, logits_N3: Tensor) -> Tensor:
        length_N = torch.tensor([len(prefix) for prefix in self.prefixes])
        barred_N3 = torch.zeros_like(logits_N3, dtype=torch.bool)
        barred_N3[:, STOP] = length_N < self.min_len
        barred_N3[:, :STOP] = (length_N >= self.max_len)[:, None]
        return logits_N3.masked_fill(barred_N3, -math.inf)

    def log_posterior(self) -> Tensor:
        return torch.tensor([self.log_reward[s] for s in self.strings]).double().log_softmax(0)

    def log_policy(self, logits_N3: Tensor) -> Tensor:
        """Exact log-probability of every string."""
        every = list(range(len(self.strings)))
        batch = self.batch(logits_N3, every)
        last_B = [(row, len(self.strings[row])) for row in every]
        stop_B = torch.stack([batch.log_stop_BS[row, t] for row, t in last_B])
        return batch.log_pf_BT.sum(1) + stop_B

    def optimal_logits(self) -> Tensor:
        """logit of a token = log flow of the child, of stop = log R."""

        def log_flow(prefix: tuple[int, ...]) -> float:
            here = [self.log_reward[prefix]] if len(prefix) >= self.min_len else []
            below = [log_flow((*prefix, z)) for z in (0, 1)] if len(prefix) < self.max_len else []
            return float(torch.tensor(here + below, dtype=torch.float64).logsumexp(0))

        rows = []
        for prefix in self.prefixes:
            below = [log_flow((*prefix, z)) if len(prefix) < self.max_len else 0.0 for z in (0, 1)]
            rows.append([*below, self.log_reward.get(prefix, 0.0)])
        return torch.tensor(rows, dtype=torch.float64)


def make_toy(min_len: int, max_len: int = 4) -> Toy:
    generator = torch.Generator().manual_seed(7)
    lengths = range(max_len + 1)
    prefixes = [s for length in lengths for s in itertools.product((0, 1), repeat=length)]
    strings = [s for s in prefixes if len(s) >= min_len]
    log_reward = {s: 2 * torch.randn((), generator=generator).item() - 30 for s in strings}
    return Toy(min_len, max_len, strings, log_reward, prefixes)
