"""Trajectory balance as the limit of SubTB."""

import torch

from learner.objectives.subtb import SubTB
from learner.objectives.tb import TrajectoryBalance
from tests.objective_family import ragged_batch
from tests.tabular_toy import loss_of


def test_it_is_the_limit_of_subtb_for_a_growing_lambda() -> None:
    batch = ragged_batch(root_stops="never")
    tb = loss_of(batch, TrajectoryBalance())
    far = loss_of(batch, SubTB(1e6, "trajectory"))
    near = loss_of(batch, SubTB(1.0, "trajectory"))
    torch.testing.assert_close(far, tb, rtol=1e-4, atol=0.0)
    assert abs(near - tb) > 0.1 * tb


def test_what_stopping_on_the_way_would_earn_does_not_enter() -> None:
    batch = ragged_batch(root_stops="mixed")
    before = loss_of(batch, TrajectoryBalance())
    last_B1 = batch.stop_BS.shape[1] - 1 - batch.stop_BS.flip(1).int().argmax(1, keepdim=True)
    on_the_way_BS = torch.arange(batch.stop_BS.shape[1]) < last_B1
    batch.log_reward_BS[on_the_way_BS] -= 50
    assert torch.equal(before, loss_of(batch, TrajectoryBalance()))
