"""Trajectory balance against brute force, and as the limit of SubTB."""

import torch

from learner.objective import ObjectiveInput
from learner.subtb import SubTB
from learner.tb import TrajectoryBalance
from tests.tabular_toy import loss_of


def ragged_batch() -> tuple[ObjectiveInput, list[torch.Tensor]]:
    """Five rows of two prompts, NaN as padding, log q as leaves of the graph."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.tensor([1, 4, 6, 2, 5])
    state_S = torch.arange(7)
    stop_BS = (torch.rand(5, 7, generator=generator) < 0.6) & (state_S < lengths_B[:, None])
    stop_BS |= state_S == lengths_B[:, None]
    stop_BS[:, 0] = False
    log_pf_BT = -3 * torch.rand(5, 6, generator=generator).double()
    log_stop_BS = -5 * torch.rand(5, 7, generator=generator).double()
    log_reward_BS = 4 * torch.randn(5, 7, generator=generator).double() - 40
    leaves = [log_pf_BT.requires_grad_(), log_stop_BS.requires_grad_()]
    padding_BS = torch.where(stop_BS, 0.0, torch.nan)
    batch = ObjectiveInput(
        leaves[0],
        leaves[1] + padding_BS,
        log_reward_BS + padding_BS,
        stop_BS,
        torch.tensor([0, 0, 1, 1, 1]),
    )
    return batch, leaves


def test_loss_and_gradient_equal_brute_force() -> None:
    batch, leaves = ragged_batch()
    last = [max(t for t in range(7) if row[t]) for row in batch.stop_BS.tolist()]
    phis = [
        batch.log_pf_BT[b, :t].sum() + batch.log_stop_BS[b, t] - batch.log_reward_BS[b, t]
        for b, t in enumerate(last)
    ]
    total = torch.zeros((), dtype=torch.float64)
    for b, phi in enumerate(phis):
        mates = [phis[c].item() for c in range(5) if batch.group_B[c] == batch.group_B[b]]
        total = total + (phi - sum(mates) / len(mates)) ** 2
    expected = torch.autograd.grad(total / 5, leaves, retain_graph=True)
    loss = loss_of(batch, TrajectoryBalance())
    torch.testing.assert_close(loss, total / 5)
    for gradient, brute in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, brute)


def test_it_is_the_limit_of_subtb_for_a_growing_lambda() -> None:
    batch, _ = ragged_batch()
    tb = TrajectoryBalance()(batch).total / 5
    far = loss_of(batch, SubTB(1e6, "trajectory"))
    near = loss_of(batch, SubTB(1.0, "trajectory"))
    torch.testing.assert_close(far, tb, rtol=1e-4, atol=0.0)
    assert abs(near - tb) > 0.1 * tb
