"""SubTB against brute force over all pairs, its analytic optimum, and an enumerable posterior."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.objective import ObjectiveInput
from learner.potential import estimate_log_z
from learner.subtb import SubTB, pair_sums
from tests.tabular_toy import loss_of

DECAYS = (0.3, 0.9, 1.0, 1.1)


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
