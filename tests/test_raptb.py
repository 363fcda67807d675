"""Root-anchored prefixes: what they share with trajectory balance, and where they differ."""

import pytest
import torch

from learner.objectives.raptb import RootedPrefixBalance
from learner.objectives.tb import TrajectoryBalance
from tests.objective_family import gradients, ragged_batch
from tests.tabular_toy import loss_of, make_toy


@pytest.mark.parametrize("log_z", ["group", "learned"])
def test_its_value_is_that_of_trajectory_balance(log_z: str) -> None:
    batch = ragged_batch(root_stops="mixed", log_z=log_z)
    rooted = loss_of(batch, RootedPrefixBalance("trajectory"))
    torch.testing.assert_close(rooted, loss_of(batch, TrajectoryBalance()))


def test_a_token_gets_as_much_gradient_as_prefixes_hold_it() -> None:
    batch = ragged_batch(root_stops="mixed")
    rooted_BT, rooted_BS = gradients(RootedPrefixBalance()(batch).total, batch)
    tb_BT, tb_BS = gradients(TrajectoryBalance()(batch).total, batch)
    # Of the prefixes z_1:t, t > 0 a stop state, token number k stands in those with t >= k.
    holding_BT = batch.stop_BS[:, 1:].flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(rooted_BT, tb_BT * holding_BT)
    torch.testing.assert_close(rooted_BS, tb_BS)
    assert holding_BT.max() > 5


def test_stop_rewards_of_prefixes_do_not_enter() -> None:
    batch = ragged_batch(root_stops="mixed")
    before = loss_of(batch, RootedPrefixBalance())
    last_B1 = batch.stop_BS.shape[1] - 1 - batch.stop_BS.flip(1).int().argmax(1, keepdim=True)
    batch.log_reward_BS[torch.arange(batch.stop_BS.shape[1]) < last_B1] -= 50
    assert torch.equal(before, loss_of(batch, RootedPrefixBalance()))


def test_an_absorbed_reward_in_place_of_the_stop_reward_is_not_zero_at_the_posterior() -> None:
    toy = make_toy(0)
    batch = toy.batch(toy.optimal_logits(), [len(toy.strings) - 1])
    path_S = torch.nn.functional.pad(batch.log_pf_BT[0].cumsum(0), (1, 0))
    absorbed_S = batch.log_reward_BS[0].flip(0).cummax(0).values.flip(0)  # best of the suffix
    naive_S = toy.log_z + path_S + batch.log_stop_BS[0] - absorbed_S
    assert naive_S[-1].abs() < 1e-9 and naive_S[:-1].abs().max() > 0.5
    assert loss_of(batch, RootedPrefixBalance()) < 1e-20
