"""SubTB against brute force over all pairs, its analytic optimum, and an enumerable posterior."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.objective import ObjectiveInput
from learner.potential import estimate_log_z, state_potentials
from learner.subtb import SubTB, pair_sums

DECAYS = (0.3, 0.9, 1.0, 1.1)
STOP = 2  # column of the stop action in the tabular policies, after the tokens 0 and 1


def ragged_batch(*, root_stops: str, seed: int = 0) -> ObjectiveInput:
    """Rows of very different length with holes between the stop states, as tools leave them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (0, 1, 2, 5, 9, 14) if root_stops != "never" else (1, 2, 3, 5, 9, 14)
    tokens = max(lengths)
    stop_BS = torch.rand(len(lengths), tokens + 1, generator=generator) < 0.7
    for row, length in enumerate(lengths):
        stop_BS[row, length] = True
        stop_BS[row, length + 1 :] = False
        if root_stops == "always" or (root_stops == "mixed" and row % 2 == 0):
            stop_BS[row, 0] = True
        elif length > 0:
            stop_BS[row, 0] = False
    return ObjectiveInput(
        log_pf_BT=-3 * torch.rand(len(lengths), tokens, generator=generator).double(),
        log_stop_BS=-5 * torch.rand(len(lengths), tokens + 1, generator=generator).double(),
        log_reward_BS=9 * torch.randn(len(lengths), tokens + 1, generator=generator).double() - 90,
        stop_BS=stop_BS,
        group_B=torch.tensor([0, 0, 0, 1, 1, 2]),
    )


def brute_force_rows(batch: ObjectiveInput, decay: float) -> list[tuple[Tensor, float]]:
    """(sum, weight) of each row, straight from eq. 3: every pair, every token between."""
    states = [[t for t in range(len(row)) if row[t]] for row in batch.stop_BS.tolist()]

    def log_ratio(row: int, t: int) -> Tensor:  # log q(z_1:t stop) - log R(z_1:t stop)
        return (
            batch.log_pf_BT[row, :t].sum() + batch.log_stop_BS[row, t] - batch.log_reward_BS[row, t]
        )

    rows = []
    for row, stops in enumerate(states):
        mates = [b for b in range(len(states)) if batch.group_B[b] == batch.group_B[row]]
        log_z = -sum(log_ratio(b, states[b][-1]).item() for b in mates) / len(mates)
        root = [] if stops[0] == 0 else [torch.tensor(-log_z, dtype=torch.float64)]
        phis = root + [log_ratio(row, t) for t in stops]
        total, weight = torch.zeros((), dtype=torch.float64), 0.0
        for i, j in itertools.combinations(range(len(phis)), 2):
            total = total + decay ** (j - i - 1) * (phis[j] - phis[i]) ** 2
            weight += decay ** (j - i - 1)
        rows.append((total, weight))
    return rows


def with_leaves(batch: ObjectiveInput) -> tuple[ObjectiveInput, list[Tensor]]:
    """The batch with log q as leaves of the graph, and the leaves."""
    leaves = [batch.log_pf_BT.clone().requires_grad_(), batch.log_stop_BS.clone().requires_grad_()]
    return ObjectiveInput(
        leaves[0], leaves[1], batch.log_reward_BS, batch.stop_BS, batch.group_B
    ), leaves


def loss_of(batch: ObjectiveInput, objective: SubTB) -> Tensor:
    total = objective(batch).total
    return total / objective.weight(batch.stop_BS).to(total)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("root_stops", ["always", "never", "mixed"])
@pytest.mark.parametrize("normalisation", ["batch", "trajectory"])
def test_loss_and_gradient_equal_brute_force(
    decay: float, root_stops: str, normalisation: Any
) -> None:
    batch = ragged_batch(root_stops=root_stops)
    fast, fast_leaves = with_leaves(batch)
    slow, slow_leaves = with_leaves(batch)
    loss = loss_of(fast, SubTB(decay, normalisation))
    rows = [(total, weight) for total, weight in brute_force_rows(slow, decay) if weight > 0]
    if normalisation == "batch":
        expected = sum(total for total, _ in rows) / sum(weight for _, weight in rows)
    else:
        expected = sum(total / weight for total, weight in rows) / len(rows)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    loss.backward()
    expected.backward()
    for mine, brute in zip(fast_leaves, slow_leaves, strict=True):
        torch.testing.assert_close(mine.grad, brute.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_stays_within_1e_5_of_float64(decay: float) -> None:
    batch = ragged_batch(root_stops="mixed")
    single = ObjectiveInput(
        batch.log_pf_BT.float(),
        batch.log_stop_BS.float(),
        batch.log_reward_BS.float(),
        batch.stop_BS,
        batch.group_B,
    )
    objective = SubTB(decay)
    assert loss_of(single, objective).item() == pytest.approx(
        loss_of(batch, objective).item(), rel=1e-5
    )


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_a_large_common_offset_does_not_cancel_in_float32(decay: float) -> None:
    phi_BN = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).double()
    real_BN = torch.ones(3, 20, dtype=torch.bool)
    exact = pair_sums(phi_BN, real_BN, decay)
    shifted = pair_sums((phi_BN + 1024).float(), real_BN, decay)
    torch.testing.assert_close(shifted.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("padding", [math.nan, -math.inf, math.inf])
def test_padding_of_any_value_changes_nothing_and_gets_no_gradient(
    decay: float, padding: float
) -> None:
    batch = ragged_batch(root_stops="mixed")
    last_B1 = batch.stop_BS.shape[1] - 1 - batch.stop_BS.flip(1).int().argmax(1, keepdim=True)
    token_BT = torch.arange(batch.log_pf_BT.shape[1])[None] < last_B1
    padded = ObjectiveInput(
        torch.where(token_BT, batch.log_pf_BT, padding),
        torch.where(batch.stop_BS, batch.log_stop_BS, padding),
        torch.where(batch.stop_BS, batch.log_reward_BS, padding),
        batch.stop_BS,
        batch.group_B,
    )
    padded, (log_pf_BT, log_stop_BS) = with_leaves(padded)
    loss = loss_of(padded, SubTB(decay))
    loss.backward()
    assert loss.item() == loss_of(batch, SubTB(decay)).item()
    assert log_pf_BT.grad is not None and log_stop_BS.grad is not None
    assert log_pf_BT.grad.isfinite().all() and log_stop_BS.grad.isfinite().all()
    assert (log_pf_BT.grad[~token_BT] == 0).all()
    assert (log_stop_BS.grad[~batch.stop_BS] == 0).all()


def test_gradient_of_the_decayed_sum_passes_a_numerical_check() -> None:
    phi_BN = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    real_BN = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    assert torch.autograd.gradcheck(lambda phi: pair_sums(phi, real_BN, 0.7), (phi_BN,))


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_memory_kept_for_backward_is_linear_in_length(decay: float) -> None:
    def saved_bytes(tokens: int) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        stop_BS = torch.ones(4, tokens + 1, dtype=torch.bool)
        batch = ObjectiveInput(
            torch.randn(4, tokens, requires_grad=True),
            torch.randn(4, tokens + 1, requires_grad=True),
            torch.randn(4, tokens + 1),
            stop_BS,
            torch.arange(4),
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = SubTB(decay)(batch)
        value.total.backward()
        return sum(saved.values())

    assert saved_bytes(2048) / saved_bytes(1024) == pytest.approx(2.0, rel=0.02)


def test_time_does_not_grow_with_the_number_of_pairs() -> None:
    # 2 x 20,001 states make 4e8 pairs: a pair matrix would need 1.6 GB.
    phi_BN = torch.randn(2, 20_001, requires_grad=True)
    pair_sums(phi_BN, torch.ones(2, 20_001, dtype=torch.bool), 0.99).sum().backward()
    assert phi_BN.grad is not None and phi_BN.grad.isfinite().all()


def test_one_trajectory_per_prompt_estimates_its_own_log_z() -> None:
    phi_B = torch.tensor([3.0, 5.0, 11.0])
    alone_B = estimate_log_z(phi_B, torch.tensor([0, 1, 2]))
    together_B = estimate_log_z(phi_B, torch.tensor([1, 0, 1]))
    assert alone_B.tolist() == [-3.0, -5.0, -11.0]
    assert together_B.tolist() == [-7.0, -5.0, -7.0]


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


@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("min_len", [0, 2])
def test_loss_and_gradient_vanish_at_the_analytic_optimum(min_len: int, decay: float) -> None:
    toy = make_toy(min_len)
    logits_N3 = toy.optimal_logits().requires_grad_()
    batch = toy.batch(logits_N3, list(range(len(toy.strings))))
    value = SubTB(decay)(batch)
    value.total.backward()
    log_z = torch.tensor(list(toy.log_reward.values())).double().logsumexp(0)
    phi_BS = state_potentials(
        batch.log_pf_BT, batch.log_stop_BS, batch.log_reward_BS, batch.stop_BS
    )
    torch.testing.assert_close(phi_BS[batch.stop_BS], -log_z.expand(int(batch.stop_BS.sum())))
    assert value.total.item() == pytest.approx(0, abs=1e-10)
    assert logits_N3.grad is not None and logits_N3.grad.abs().max() < 1e-5
    assert value.row_sums["log_z_nats"].item() == pytest.approx(log_z.item() * len(toy.strings))


@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("min_len", [0, 2])
def test_off_policy_training_converges_to_the_exact_posterior(min_len: int, decay: float) -> None:
    toy = make_toy(min_len)
    logits_N3 = torch.zeros(len(toy.prefixes), 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits_N3], lr=0.1)
    objective = SubTB(decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        # The behaviour picks strings uniformly: it is nobody's policy and never changes.
        rows = torch.randint(len(toy.strings), (16,), generator=generator).tolist()
        optimizer.zero_grad()
        loss_of(toy.batch(logits_N3, rows), objective).backward()
        optimizer.step()
    distance = (toy.log_policy(logits_N3).exp() - toy.log_posterior().exp()).abs().sum() / 2
    assert distance.item() < 0.01
