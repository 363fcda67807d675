"""The enumerated posterior against rewards that are scored one by one."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from lm.actions import ActionSpace
from lm.next_action import NextLogits
from reward.packed import suffix_log_rewards
from tasks.posterior.divergence import divergence
from tasks.posterior.enumeration import ExactPosterior, LogWeight, exact_posterior
from tasks.posterior.weights import log_rewards
from tests.posterior_toy import Doubling, Optimum, Tokens, Toy

TOYS = {
    "plain": Toy(),
    "min_len 2": Toy(min_len=2, answer=(5, 1)),
    "tool": Toy(tool=Doubling(), context=(1, 4)),
    "tool, min_len 2": Toy(tool=Doubling(), min_len=2, answer=(5, 5, 1)),
    "stop after tool": Toy(tool=Doubling(), stop_after_tool=True),
    "stop behind": Toy(stop_behind=frozenset({1}), max_len=5),
    "stop behind, tool": Toy(tool=Doubling(), stop_behind=frozenset({2}), min_len=1, max_len=5),
    "stop every": Toy(stop_every=2, min_len=1, max_len=4),
    "stop every, tool": Toy(tool=Doubling(), stop_every=2, max_len=5),
    "Y begins legally": Toy(answer=(1, 5)),
}
every_toy = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS.keys())


def as_in_training(toy: Toy, temperature: float = 1.0) -> LogWeight:
    """log R / T by the packed pass."""

    def log_weight(completions: Sequence[Tokens]) -> NDArray[np.float64]:
        log_r = log_rewards(
            completions,
            toy.prompt,
            toy.query,
            lambda items: suffix_log_rewards(toy.model, items, 256),
        )
        return log_r / temperature

    return log_weight


def true_posterior(toy: Toy, temperature: float = 1.0) -> dict[Tokens, float]:
    completions = [*toy.completions()]
    log_weight_N = toy.log_rewards(completions) / temperature
    p_N = np.exp(log_weight_N - np.logaddexp.reduce(log_weight_N))
    return dict(zip(completions, p_N, strict=True))


def as_dict(posterior: ExactPosterior) -> dict[Tokens, float]:
    return dict(zip(posterior.support.completions, np.exp(posterior.log_p_N), strict=True))


@every_toy
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_a_complete_enumeration_is_the_posterior(toy: Toy, temperature: float) -> None:
    tree = toy.tree(bounded=temperature <= 1, temperature=temperature)
    posterior = exact_posterior(tree, as_in_training(toy, temperature), tolerance=0.0)
    assert posterior.left_out_p == 0.0 and posterior.within(0.0, policy=0)
    assert posterior.log_z == pytest.approx(toy.log_z(temperature), abs=1e-4)
    assert as_dict(posterior) == pytest.approx(true_posterior(toy, temperature), abs=1e-5)
    assert np.exp(posterior.log_p_N).sum() == pytest.approx(1.0, abs=1e-12)


@every_toy
@pytest.mark.parametrize("tolerance", [0.3, 0.03])
def test_a_pruned_enumeration_keeps_its_promise(toy: Toy, tolerance: float) -> None:
    posterior = exact_posterior(toy.tree(), as_in_training(toy), tolerance=tolerance)
    assert posterior.within(tolerance, policy=0)
    truth = true_posterior(toy)
    missed = 1.0 - sum(truth[z] for z in posterior.support.completions)
    assert missed <= posterior.left_out_p + 1e-5 <= tolerance + 1e-5
    assert posterior.log_z <= toy.log_z() + 1e-5
    assert posterior.log_z - math.log1p(-posterior.left_out_p) >= toy.log_z() - 1e-5


class Sharpened(NextLogits):
    """Nearly always takes the likeliest action."""

    def action_log_probs(
        self, actions: ActionSpace, prefixes: Sequence[Tokens], may_stop: Sequence[bool]
    ) -> Tensor:
        log_q_NC = super().action_log_probs(actions, prefixes, may_stop)
        return (20 * log_q_NC).log_softmax(dim=-1)


def test_a_policy_surer_than_the_posterior_does_not_end_the_search() -> None:
    toy, rounds = Toy(max_len=6, answer=(5, 1, 5)), []

    def log_weight(completions: Sequence[Tokens]) -> NDArray[np.float64]:
        rounds.append([*completions])
        return as_in_training(toy)(completions)

    found = exact_posterior(toy.tree(Sharpened(toy.model)), log_weight, tolerance=0.1)
    # More than one, since nothing is known of Z(X) before the first.
    assert len(rounds) > 1
    assert [z for one in rounds for z in one] == list(found.support.completions)
    truth = true_posterior(toy)
    assert sum(truth[z] for z in found.support.completions) >= 0.9
    assert found.within(0.1, policy=0)


def test_pruning_saves_most_of_the_work() -> None:
    toy = Toy(max_len=6)
    pruned = exact_posterior(toy.tree(), as_in_training(toy), tolerance=0.2).support
    assert pruned.nodes < 0.7 * sum(3**length for length in range(7))


@pytest.mark.parametrize("bounded", [True, False])
def test_a_tree_that_ends_too_early_does_not_claim_the_tolerance(bounded: bool) -> None:
    toy = Toy()
    tree = toy.tree(max_nodes=4, bounded=bounded)
    posterior = exact_posterior(tree, as_in_training(toy), tolerance=1e-3)
    assert not posterior.within(1e-3, policy=0)
    assert posterior.left_out_p < 1 if bounded else posterior.left_out_p == 1


def test_no_nodes_at_all_leave_everything_out() -> None:
    toy = Toy()
    posterior = exact_posterior(toy.tree(max_nodes=0), as_in_training(toy), tolerance=1e-3)
    assert posterior.left_out_p == 1.0 and posterior.support.left_out_q_K.tolist() == [1.0]
    assert posterior.log_p_N.shape == (0,) and posterior.log_z == -math.inf


def test_rewards_of_zero_before_any_other_do_not_end_the_search() -> None:
    toy = Toy(min_len=0, max_len=3)

    def log_weight(completions: Sequence[Tokens]) -> NDArray[np.float64]:
        # Nothing but one unlikely string is worth anything, though the bound cannot know.
        return np.array([-60.0 if z == (2, 1, 3) else -np.inf for z in completions])

    posterior = exact_posterior(toy.tree(), log_weight, tolerance=1e-3)
    assert as_dict(posterior)[(2, 1, 3)] == 1.0
    assert posterior.log_z == -60.0 and posterior.within(1e-3, policy=0)


def test_where_no_completion_has_a_reward_there_is_no_posterior() -> None:
    toy = Toy(max_len=2)
    posterior = exact_posterior(
        toy.tree(), lambda completions: np.full(len(completions), -np.inf), tolerance=1e-3
    )
    assert (posterior.log_z, posterior.left_out_p) == (-math.inf, 1.0)
    assert len(posterior.support.completions) == 13


@every_toy
def test_the_optimum_of_training_has_no_distance(toy: Toy) -> None:
    tree = toy.tree(Optimum(toy), NextLogits(toy.model))
    posterior = exact_posterior(tree, as_in_training(toy), tolerance=0.0)
    optimum = divergence(posterior.support.log_q_KN[0], posterior.log_p_N)
    assert optimum.tv < 1e-5
    assert max(abs(optimum.kl_q_p), abs(optimum.kl_p_q), abs(optimum.jsd)) < 1e-8
    assert divergence(posterior.support.log_q_KN[1], posterior.log_p_N).tv > 0.05
