"""What every objective must hold: its analytic optimum, and the posterior it converges to."""

import pytest
import torch

from learner.objective import Objective
from learner.potential import state_potentials
from learner.subtb import SubTB
from learner.tb import TrajectoryBalance
from tests.tabular_toy import loss_of, make_toy

OBJECTIVES = (SubTB(0.9), SubTB(1.0), TrajectoryBalance())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("min_len", [0, 2])
def test_loss_and_gradient_vanish_at_the_analytic_optimum(
    min_len: int, objective: Objective
) -> None:
    toy = make_toy(min_len)
    logits_N3 = toy.optimal_logits().requires_grad_()
    batch = toy.batch(logits_N3, list(range(len(toy.strings))))
    value = objective(batch)
    value.total.backward()
    log_z = torch.tensor(list(toy.log_reward.values())).double().logsumexp(0)
    phi_BS = state_potentials(
        batch.log_pf_BT, batch.log_stop_BS, batch.log_reward_BS, batch.stop_BS
    )
    torch.testing.assert_close(phi_BS[batch.stop_BS], -log_z.expand(int(batch.stop_BS.sum())))
    assert value.total.item() == pytest.approx(0, abs=1e-10)
    assert logits_N3.grad is not None and logits_N3.grad.abs().max() < 1e-5
    assert value.row_sums["log_z_nats"].item() == pytest.approx(log_z.item() * len(toy.strings))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("min_len", [0, 2])
def test_off_policy_training_converges_to_the_exact_posterior(
    min_len: int, objective: Objective
) -> None:
    toy = make_toy(min_len)
    logits_N3 = torch.zeros(len(toy.prefixes), 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits_N3], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        # The behaviour picks strings uniformly: it is nobody's policy and never changes.
        rows = torch.randint(len(toy.strings), (16,), generator=generator).tolist()
        optimizer.zero_grad()
        loss_of(toy.batch(logits_N3, rows), objective).backward()
        optimizer.step()
    distance = (toy.log_policy(logits_N3).exp() - toy.log_posterior().exp()).abs().sum() / 2
    assert distance.item() < 0.01
