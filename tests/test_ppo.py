"""Reward maximisation: brute force, the exact policy gradient, and the optimum of its objective."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.objectives.base import ObjectiveInput
from learner.objectives.ppo import ClippedPolicyGradient, NotOnPolicy
from lm.adapter import adapter_off
from tests.learner_toy import Published, UniformReplay, adapter_of, make_learner
from tests.objective_family import gradients, ragged_batch, rows_of
from tests.tabular_toy import Toy, loss_of, make_toy, total_variation

KL = 0.5
TOYS = {"stops at once": make_toy(0), "tool, min_len 2": make_toy(2, tool=True)}
every_toy = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


def moved_batch(seed: int = 0) -> ObjectiveInput:
    """A ragged batch whose policy has moved away from what sampled it, and from the base LM."""
    batch = ragged_batch(root_stops="mixed")
    generator = torch.Generator().manual_seed(seed)

    def moved(log_q: Tensor) -> Tensor:
        return log_q.detach() + 0.4 * torch.randn(log_q.shape, generator=generator).double()

    return dataclasses.replace(
        batch,
        behaviour_log_prob_BT=moved(batch.log_pf_BT),
        behaviour_log_stop_BS=moved(batch.log_stop_BS),
        base_log_pf_BT=moved(batch.log_pf_BT),
        base_log_stop_BS=moved(batch.log_stop_BS),
    )


def brute_force(batch: ObjectiveInput, clip: float) -> Tensor:
    """By loops over rows and actions; PPO's own form, with the constant that ours leaves out."""
    assert batch.behaviour_log_prob_BT is not None and batch.behaviour_log_stop_BS is not None
    assert batch.base_log_pf_BT is not None and batch.base_log_stop_BS is not None
    now = list(rows_of(batch))
    then, base = (
        list(rows_of(dataclasses.replace(batch, log_pf_BT=tokens, log_stop_BS=stops)))
        for tokens, stops in (
            (batch.behaviour_log_prob_BT, batch.behaviour_log_stop_BS),
            (batch.base_log_pf_BT, batch.base_log_stop_BS),
        )
    )
    group = batch.group_B.tolist()
    returns = []
    for mine, prior in zip(then, base, strict=True):
        end = mine.length
        log_mu = mine.path(0, end) + mine.log_stop[end]
        log_p = prior.path(0, end) + prior.log_stop[end]
        returns.append((mine.log_reward[end] - KL * (log_mu - log_p)).item())
    loss = torch.zeros((), dtype=torch.float64)
    for row, (new, old) in enumerate(zip(now, then, strict=True)):
        mates = [m for m in range(len(now)) if m != row and group[m] == group[row]]
        if not mates:
            continue
        advantage = returns[row] - sum(returns[m] for m in mates) / len(mates)
        end = new.length
        actions = [(new.log_pf[k], old.log_pf[k]) for k in range(end)]
        for log_new, log_old in [*actions, (new.log_stop[end], old.log_stop[end])]:
            ratio = (log_new - log_old).exp()
            held = ratio.clamp(1 - clip, 1 + clip)
            loss = loss - (torch.minimum(ratio * advantage, held * advantage) - advantage)
    return loss / len(now)


@pytest.mark.parametrize("clip", [0.1, 0.4, 5.0])
def test_loss_and_gradient_equal_brute_force(clip: float) -> None:
    batch = moved_batch()
    loss, expected = loss_of(batch, ClippedPolicyGradient(clip, KL)), brute_force(batch, clip)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for mine, brute in zip(gradients(loss, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(mine, brute, rtol=1e-9, atol=1e-12)


def test_padding_of_any_value_changes_nothing_and_gets_no_gradient() -> None:
    batch = moved_batch()
    objective = ClippedPolicyGradient(0.2, KL)
    last_B1 = batch.stop_BS.shape[1] - 1 - batch.stop_BS.flip(1).int().argmax(1, keepdim=True)
    token_BT = torch.arange(batch.log_pf_BT.shape[1])[None] < last_B1

    def padded(name: str) -> Tensor:
        real = token_BT if name.endswith("BT") else batch.stop_BS
        return torch.where(real, getattr(batch, name), math.nan).detach().requires_grad_()

    names = [f"{whose}log_{what}" for whose in ("", "base_") for what in ("pf_BT", "stop_BS")]
    names += ["behaviour_log_prob_BT", "behaviour_log_stop_BS"]
    junk: dict[str, Any] = {name: padded(name) for name in names}
    changed = dataclasses.replace(batch, **junk)
    loss = loss_of(changed, objective)
    assert loss.item() == loss_of(batch, objective).item()
    got, expected = gradients(loss, changed), gradients(loss_of(batch, objective), batch)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def on_policy(
    toy: Toy, logits_N3: Tensor, base_N3: Tensor, rows: list[int], groups: Tensor
) -> ObjectiveInput:
    """Rows sampled by the policy as it is."""
    batch, base = toy.batch(logits_N3, rows), toy.batch(base_N3, rows)
    return dataclasses.replace(
        batch,
        group_B=groups,
        behaviour_log_prob_BT=batch.log_pf_BT.detach(),
        behaviour_log_stop_BS=batch.log_stop_BS.detach(),
        base_log_pf_BT=base.log_pf_BT.detach(),
        base_log_stop_BS=base.log_stop_BS.detach(),
    )


def random_logits(toy: Toy, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(toy.prefixes), 3, generator=generator).double()


@every_toy
def test_at_ratio_1_its_expected_gradient_is_the_exact_policy_gradient(toy: Toy) -> None:
    logits_N3, base_N3 = random_logits(toy, 0).requires_grad_(), random_logits(toy, 1)
    log_q_N, log_p_N = toy.log_policy(logits_N3), toy.log_policy(base_N3)
    log_r_N = torch.tensor([*toy.log_reward.values()], dtype=torch.float64)
    exact = -(log_q_N.exp() * (log_r_N - KL * (log_q_N - log_p_N))).sum()
    [wanted] = torch.autograd.grad(exact, logits_N3)

    # The expectation over groups of two, all of them enumerated.
    expected = torch.zeros_like(wanted)
    q_N = toy.log_policy(logits_N3.detach()).exp()
    for pair in itertools.product(range(len(toy.strings)), repeat=2):
        batch = on_policy(toy, logits_N3, base_N3, list(pair), torch.zeros(2, dtype=torch.long))
        loss = loss_of(batch, ClippedPolicyGradient(0.2, KL))
        [gradient] = torch.autograd.grad(loss, logits_N3)
        expected += q_N[list(pair)].prod() * gradient
    torch.testing.assert_close(expected, wanted, rtol=1e-9, atol=1e-10)


@every_toy
def test_nothing_is_left_to_learn_at_base_times_reward_to_the_power_of_1_over_kl(toy: Toy) -> None:
    base_N3 = random_logits(toy, 1)
    log_optimum_N = toy.log_policy(base_N3) + reward_of(toy) / KL
    tilted = dataclasses.replace(
        toy, log_reward=dict(zip(toy.strings, log_optimum_N.tolist(), strict=True))
    )
    logits_N3 = tilted.optimal_logits().requires_grad_()
    torch.testing.assert_close(toy.log_policy(logits_N3), log_optimum_N.log_softmax(0))
    rows = list(range(len(toy.strings)))
    batch = on_policy(toy, logits_N3, base_N3, rows, torch.zeros(len(rows), dtype=torch.long))
    value = ClippedPolicyGradient(0.2, KL)(batch)
    [gradient] = torch.autograd.grad(value.total, logits_N3)
    assert gradient.abs().max() < 1e-9
    assert value.row_sums["clipped_share"] == 0


@every_toy
def test_training_on_policy_reaches_that_optimum(toy: Toy) -> None:
    base_N3 = random_logits(toy, 1)
    generator = torch.Generator().manual_seed(0)
    logits_N3 = base_N3.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits_N3])
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 600)
        with torch.no_grad():
            q_N = toy.log_policy(logits_N3).exp()
        rows = torch.multinomial(q_N, 32, replacement=True, generator=generator).tolist()
        batch = on_policy(toy, logits_N3, base_N3, rows, torch.zeros(32, dtype=torch.long))
        optimizer.zero_grad()
        loss_of(batch, ClippedPolicyGradient(0.2, KL)).backward()
        optimizer.step()
    optimum = (toy.log_policy(base_N3) + reward_of(toy) / KL).log_softmax(0)
    assert total_variation(toy.log_policy(logits_N3), optimum) < 0.02
    assert total_variation(toy.log_policy(logits_N3), toy.log_posterior()) > 0.1


def reward_of(toy: Toy) -> Tensor:
    return torch.tensor([*toy.log_reward.values()], dtype=torch.float64)


def test_it_says_what_it_lacks() -> None:
    with pytest.raises(NotOnPolicy, match="samplers recorded"):
        ClippedPolicyGradient()(ragged_batch(root_stops="mixed"))
    halfway = dataclasses.replace(moved_batch(), base_log_pf_BT=None)
    with pytest.raises(NotOnPolicy, match="base LM"):
        ClippedPolicyGradient()(halfway)


class Seen:
    """An objective that keeps what it is given."""

    traits = ClippedPolicyGradient.traits

    def __init__(self) -> None:
        self.batches: list[ObjectiveInput] = []
        self._inner = ClippedPolicyGradient()

    def weight(self, stop_BS: Tensor) -> Tensor:
        return self._inner.weight(stop_BS)

    def __call__(self, batch: ObjectiveInput) -> Any:
        self.batches.append(batch)
        return self._inner(batch)


def test_the_learner_gives_it_the_base_lm_and_what_was_recorded() -> None:
    seen = Seen()
    learner, model = make_learner(objective=seen, replay=UniformReplay(), weights=Published())
    for _ in range(2):
        metrics = learner.step()
    first, second = seen.batches
    assert first.base_log_pf_BT is not None and second.base_log_pf_BT is not None
    # A fresh adapter is the base LM; after a step it is no longer, and the base is what it was.
    torch.testing.assert_close(first.base_log_pf_BT, first.log_pf_BT.detach())
    assert not torch.allclose(second.base_log_pf_BT, second.log_pf_BT, atol=1e-3)
    assert first.behaviour_log_prob_BT is not None and (first.behaviour_log_prob_BT == 0).all()
    assert metrics["tokens/base"] == metrics["tokens/learned"] > 0
    before = adapter_of(model)
    with adapter_off(model):
        assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    after = adapter_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
