"""Detailed balance as the other limit of SubTB, and its smallest case."""

import dataclasses

import pytest
import torch

from learner.objectives.base import Normalisation
from learner.objectives.db import DetailedBalance
from learner.objectives.subtb import SubTB
from tests.objective_family import ragged_batch
from tests.tabular_toy import loss_of


@pytest.mark.parametrize("normalisation", ["batch", "trajectory"])
def test_it_is_the_limit_of_subtb_for_a_vanishing_lambda(normalisation: Normalisation) -> None:
    batch = ragged_batch(root_stops="mixed")
    db = loss_of(batch, DetailedBalance(normalisation))
    torch.testing.assert_close(loss_of(batch, SubTB(1e-6, normalisation)), db, rtol=1e-4, atol=0.0)
    assert abs(loss_of(batch, SubTB(1.0, normalisation)) - db) > 0.1 * db


def test_a_trajectory_of_one_state_has_no_neighbours_and_no_loss() -> None:
    batch = ragged_batch(root_stops="always")
    empty = dataclasses.replace(
        batch,
        log_pf_BT=batch.log_pf_BT[:1],
        log_stop_BS=batch.log_stop_BS[:1],
        log_reward_BS=batch.log_reward_BS[:1],
        stop_BS=batch.stop_BS[:1],
        group_B=batch.group_B[:1],
    )
    for normalisation in ("batch", "trajectory"):
        objective = DetailedBalance(normalisation)
        assert objective(empty).total == 0 and objective.weight(empty.stop_BS) == 0
