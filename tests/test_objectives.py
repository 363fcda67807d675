"""What every objective must hold: brute force, the analytic optimum, the posterior it trains to."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.objectives.base import ObjectiveInput
from learner.objectives.potential import state_potentials
from tests.objective_family import FAMILY, Member, gradients, ragged_batch
from tests.tabular_toy import Toy, loss_of, make_toy, total_variation

every_objective = pytest.mark.parametrize("member", FAMILY, ids=str)
every_log_z = pytest.mark.parametrize("log_z", ["group", "learned"])
TOYS = {
    "stops at once": make_toy(0),
    "min_len 2": make_toy(2),
    "tool": make_toy(0, tool=True),
    "tool, min_len 2": make_toy(2, tool=True),
}


@every_objective
@every_log_z
@pytest.mark.parametrize("root_stops", ["always", "never", "mixed"])
def test_loss_and_gradient_equal_brute_force(root_stops: str, log_z: str, member: Member) -> None:
    batch = ragged_batch(root_stops=root_stops, log_z=log_z)
    loss, expected = loss_of(batch, member.objective), member.brute_force(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for mine, brute in zip(gradients(loss, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(mine, brute, rtol=1e-5, atol=1e-9)


@every_objective
@every_log_z
def test_float32_stays_within_1e_5_of_float64(log_z: str, member: Member) -> None:
    batch = ragged_batch(root_stops="mixed", log_z=log_z)
    single = mapped(batch, lambda tensor: tensor.float())
    loss = loss_of(batch, member.objective).item()
    assert loss_of(single, member.objective).item() == pytest.approx(loss, rel=1e-5)


@every_objective
@every_log_z
@pytest.mark.parametrize("padding", [math.nan, -math.inf, math.inf])
def test_padding_of_any_value_changes_nothing_and_gets_no_gradient(
    padding: float, log_z: str, member: Member
) -> None:
    batch = ragged_batch(root_stops="mixed", log_z=log_z)
    last_B1 = batch.stop_BS.shape[1] - 1 - batch.stop_BS.flip(1).int().argmax(1, keepdim=True)
    token_BT = torch.arange(batch.log_pf_BT.shape[1])[None] < last_B1
    padded = dataclasses.replace(
        batch,
        log_pf_BT=torch.where(token_BT, batch.log_pf_BT, padding).detach().requires_grad_(),
        log_stop_BS=torch.where(batch.stop_BS, batch.log_stop_BS, padding)
        .detach()
        .requires_grad_(),
        log_reward_BS=torch.where(batch.stop_BS, batch.log_reward_BS, padding),
    )
    loss = loss_of(padded, member.objective)
    assert loss.item() == loss_of(batch, member.objective).item()
    got = gradients(loss, padded)
    expected = gradients(loss_of(batch, member.objective), batch)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert (got[0][~token_BT] == 0).all() and (got[1][~batch.stop_BS] == 0).all()


@every_objective
@every_log_z
def test_micro_batches_of_whole_groups_add_up_to_the_batch(log_z: str, member: Member) -> None:
    batch = ragged_batch(root_stops="mixed", log_z=log_z)
    parts = [select(batch, batch.group_B == group) for group in (0, 1, 2)]
    total = sum(member.objective(part).total for part in parts)
    weight = sum(member.objective.weight(part.stop_BS) for part in parts)
    assert isinstance(total, Tensor) and isinstance(weight, Tensor)
    assert weight.dtype == torch.float64 and weight == member.objective.weight(batch.stop_BS)
    whole = gradients(loss_of(batch, member.objective), batch)
    torch.testing.assert_close(total / weight, loss_of(batch, member.objective))
    for mine, expected in zip(gradients(total / weight, batch), whole, strict=True):
        torch.testing.assert_close(mine, expected)


@every_objective
@every_log_z
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_loss_and_gradient_vanish_at_the_analytic_optimum_on_any_rows(
    toy: Toy, log_z: str, member: Member
) -> None:
    logits_N3 = toy.optimal_logits().requires_grad_()
    learned = toy.log_z.clone().requires_grad_() if log_z == "learned" else None
    generator = torch.Generator().manual_seed(0)
    every = list(range(len(toy.strings)))
    for rows in (every, *(torch.randint(len(every), (5,), generator=generator) for _ in range(9))):
        batch = toy.batch(logits_N3, torch.as_tensor(rows).tolist(), learned)
        phi_BS = state_potentials(batch)[batch.stop_BS]
        torch.testing.assert_close(phi_BS, -toy.log_z.expand_as(phi_BS))
        value = member.objective(batch)
        assert value.total.item() == pytest.approx(0, abs=1e-10)
        inputs = [logits_N3] if learned is None else [logits_N3, learned]
        for gradient in torch.autograd.grad(value.total, inputs, materialize_grads=True):
            assert gradient.abs().max() < 1e-9
        mean_log_z = value.row_sums["log_z_nats"].item() / len(batch.stop_BS)
        assert mean_log_z == pytest.approx(toy.log_z.item())


@every_objective
@pytest.mark.parametrize(
    ("behaviour", "kind", "log_z"),
    [
        ("uniform", "stops at once", "group"),
        ("skewed", "tool, min_len 2", "group"),
        ("uniform", "min_len 2", "learned"),
    ],
)
def test_training_on_any_full_support_behaviour_reaches_the_exact_posterior(
    behaviour: str, kind: str, log_z: str, member: Member
) -> None:
    toy = TOYS[kind]
    generator = torch.Generator().manual_seed(0)
    # Nobody's policy, and it never changes.
    weight_N = torch.ones(len(toy.strings))
    if behaviour == "skewed":
        weight_N = torch.randn(len(toy.strings), generator=generator).exp()
    logits_N3 = torch.zeros(len(toy.prefixes), 3, dtype=torch.float64, requires_grad=True)
    learned = (toy.log_z - 2).requires_grad_()
    optimizer = torch.optim.Adam([logits_N3, learned])
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        rows = torch.multinomial(weight_N, 16, replacement=True, generator=generator).tolist()
        optimizer.zero_grad()
        batch = toy.batch(logits_N3, rows, learned if log_z == "learned" else None)
        loss_of(batch, member.objective).backward()
        optimizer.step()
    assert total_variation(toy.log_policy(logits_N3), toy.log_posterior()) < 0.01
    if log_z == "learned":
        assert learned.item() == pytest.approx(toy.log_z.item(), abs=0.02)


def mapped(batch: ObjectiveInput, change: Callable[[Tensor], Tensor]) -> ObjectiveInput:
    """The batch with `change` applied to its real-valued tensors."""
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    real = {n: change(t) for n, t in tensors.items() if t is not None and t.is_floating_point()}
    return dataclasses.replace(batch, **real)


def select(batch: ObjectiveInput, rows_B: Tensor) -> ObjectiveInput:
    chosen = mapped(batch, lambda tensor: tensor[rows_B])
    group_B = torch.zeros(int(rows_B.sum()), dtype=torch.long)
    return dataclasses.replace(chosen, stop_BS=batch.stop_BS[rows_B], group_B=group_B)
