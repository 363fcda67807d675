"""The prefix tree against all completions, found and weighed by brute force."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lm.next_action import NextLogits
from lm.sampling import Request, Sampler
from lm.scoring import completion_log_probs
from tasks.posterior.ceiling import FunctionCeiling, PriorCeiling
from tasks.posterior.enumeration import PrefixTree, Support
from tests.posterior_toy import VOCAB_SIZE, Doubling, Magic, Toy
from tests.sampling_toy import enumerable_policy

TOYS = {
    "plain": Toy(),
    "min_len 2": Toy(min_len=2),
    "no choice": Toy(max_len=0),
    "tool": Toy(tool=Doubling()),
    "tool, min_len 2": Toy(tool=Doubling(), min_len=2),
    "stop after tool": Toy(tool=Doubling(), stop_after_tool=True, max_len=5),
    "context": Toy(context=(1, 4, 4)),
    "Y of two tokens": Toy(answer=(5, 1)),
    "stop behind": Toy(stop_behind=frozenset({1}), max_len=5),
    "stop behind, tool": Toy(tool=Doubling(), stop_behind=frozenset({2}), min_len=1, max_len=5),
    "stop every": Toy(stop_every=2, min_len=1, max_len=4),
    "stop every, tool": Toy(tool=Doubling(), stop_every=2, max_len=5),
    "tool behind a text": Toy(tool=Magic()),
    "Y begins legally": Toy(answer=(1, 5), tool=Doubling()),
    "Y alone is legal": Toy(answer=(2,), min_len=1),
}
every_toy = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS.keys())


def enumerated(tree: PrefixTree) -> Support:
    while not tree.exhausted:
        tree.expand(0.0)
    return tree.support()


@every_toy
def test_every_completion_is_reached_once_with_its_probability(toy: Toy) -> None:
    support = enumerated(toy.tree())
    expected = toy.completions()
    assert len(set(support.completions)) == len(support.completions) == len(expected)
    assert dict(zip(support.completions, support.from_tool, strict=True)) == expected
    log_q = [toy.log_q(z, marks) for z, marks in expected.items()]
    got = dict(zip(support.completions, support.log_q_KN[0], strict=True))
    np.testing.assert_allclose([got[z] for z in expected], log_q, atol=1e-5)
    assert np.exp(support.log_q_KN[0]).sum() == pytest.approx(1.0, abs=1e-6)
    assert support.left_out_q_K.tolist() == [0.0]
    assert support.log_left_out_reward == -math.inf


def test_probabilities_are_those_of_the_scorer() -> None:
    toy = TOYS["tool, min_len 2"]
    support = enumerated(toy.tree())
    completions = support.completions
    with torch.no_grad():
        scored = completion_log_probs(
            toy.model,
            toy.actions,
            [toy.prompt.prompt] * len(completions),
            completions,
            support.from_tool,
        )
    last = [len(z) for z in completions]
    log_q = scored.log_pf_BT.sum(1) + scored.log_stop_BS[range(len(last)), last]
    np.testing.assert_allclose(support.log_q_KN[0], log_q.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["tool, min_len 2", "stop after tool", "tool behind a text"])
def test_the_sampler_draws_what_the_tree_says(name: str) -> None:
    toy, count = TOYS[name], 10_000
    support = enumerated(toy.tree())
    sampler = Sampler(toy.model, toy.actions, toy.tool, max_rows=4096)
    request = Request(prompt=toy.prompt.prompt)
    drawn = sampler.sample([request] * count, torch.Generator().manual_seed(0))
    seen = Counter(tuple(completion.tokens.tolist()) for completion in drawn)
    assert seen.keys() <= set(support.completions)
    for z, log_q in zip(support.completions, support.log_q_KN[0], strict=True):
        expected = math.exp(log_q)
        spread = math.sqrt(expected * (1 - expected) / count)
        assert seen[z] / count == pytest.approx(expected, abs=4.5 * spread + 1e-4), z


@every_toy
@pytest.mark.parametrize("max_nodes", [1, 7, 40])
def test_reached_and_left_out_add_up_wherever_the_tree_ends(toy: Toy, max_nodes: int) -> None:
    support = enumerated(toy.tree(max_nodes=max_nodes))
    assert support.nodes <= max_nodes
    reached = float(np.exp(support.log_q_KN[0]).sum())
    assert reached + support.left_out_q_K[0] == pytest.approx(1.0, abs=1e-6)


@every_toy
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_ceiling_is_never_below_the_reward_left_out(toy: Toy, temperature: float) -> None:
    for max_nodes in (0, 1, 2, 5, 20, 60):
        support = enumerated(toy.tree(max_nodes=max_nodes, temperature=temperature))
        left = [z for z in toy.completions() if z not in set(support.completions)]
        log_left = np.logaddexp.reduce([-np.inf, *toy.log_rewards(left) / temperature])
        assert support.log_left_out_reward >= log_left - 1e-6, max_nodes


def test_the_ceiling_counts_every_place_where_a_legal_answer_may_follow() -> None:
    # Every text of ones is read as Z Y in six ways: 1·1, 11·1, .. so their events overlap.
    toy = Toy(answer=(1,), max_len=6)
    log_ones = toy.log_rewards([(1,) * length for length in range(7)])
    assert toy.ceiling().of_everything == pytest.approx(math.log(7))
    assert float(np.logaddexp.reduce(log_ones)) < toy.ceiling().of_everything


def test_a_disjoint_answer_needs_no_such_factor() -> None:
    assert Toy(answer=(5, 1)).ceiling().of_everything == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_ceiling_is_the_prior_of_the_frontier(temperature: float) -> None:
    toy = Toy(tool=Doubling())
    tree = toy.tree(max_nodes=1, temperature=temperature)
    tree.expand(0.0)
    with torch.no_grad():
        log_p = toy.model(torch.tensor([toy.prompt.prompt])).logits[0, -1].log_softmax(0)
    # The root's children are 1, 2 and CALL; only the stop was reached.
    expected = float((log_p[[1, 2, 3]] / temperature).logsumexp(0))
    assert tree.log_left_out_reward == pytest.approx(expected, abs=1e-5)


def test_the_tools_tokens_have_their_price_in_the_prior() -> None:
    toy = Toy(tool=Doubling(), max_len=2)
    tree = toy.tree()
    while len(tree.completions) < 1 + 3 + 6:
        tree.expand(0.0)
    # All that is left is 1 CALL, 2 CALL and CALL CALL before the tool speaks, or while it does.
    spoken = [z for z in toy.completions() if len(z) == 4]
    with torch.no_grad():
        logits = toy.model(torch.tensor([[*toy.prompt.prompt, *z] for z in spoken])).logits
    log_p_NT = logits[:, 1:-1].log_softmax(-1)
    chosen = torch.tensor(spoken)
    log_prior = log_p_NT.gather(2, chosen[..., None])[..., 0].sum(1)
    bounds = []
    while not tree.exhausted:
        bounds.append(tree.log_left_out_reward)
        tree.expand(0.0)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(float(log_prior.logsumexp(0)), abs=1e-5)


def test_no_prior_bounds_rewards_above_temperature_one() -> None:
    with pytest.raises(ValueError, match="for T <= 1 only"):
        Toy().ceiling(1.5)


def test_the_heaviest_prefixes_come_first() -> None:
    toy = Toy(max_len=5)
    wide, narrow = toy.tree(bounded=False), toy.tree(bounded=False, max_nodes=64 + 60)
    support = enumerated(narrow)
    everything = enumerated(wide)
    best = sorted(everything.log_q_KN[0])[::-1]
    # A prefix weighs as much as all that begin with it, so the likeliest strings are found.
    assert max(support.log_q_KN[0]) == pytest.approx(best[0], abs=1e-5)
    assert np.exp(support.log_q_KN[0]).sum() > 2 * support.nodes / everything.nodes


def test_two_policies_are_enumerated_together() -> None:
    toy = Toy(tool=Doubling())
    other = enumerable_policy()[0]
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2.0)
    support = enumerated(toy.tree(NextLogits(toy.model), NextLogits(other)))
    alone = enumerated(toy.tree(NextLogits(other)))
    got = dict(zip(support.completions, support.log_q_KN[1], strict=True))
    expected = dict(zip(alone.completions, alone.log_q_KN[0], strict=True))
    assert got == pytest.approx(expected, abs=1e-5)
    assert np.abs(support.log_q_KN[0] - support.log_q_KN[1]).max() > 0.1


class Ones:
    """A reward of its own: 0 nats for up to two ones and nothing else, -5 a token otherwise."""

    def __init__(self) -> None:
        self.asked = 0

    def log_reward(self, completion: tuple[int, ...]) -> float:
        few = len(completion) <= 2 and set(completion) <= {1}
        return 0.0 if few else -5.0 * len(completion)

    def log_reward_ceiling(self, prefix: Sequence[int], length: int) -> float:
        self.asked += 1
        return 0.0 if length <= 2 and set(prefix) <= {1} else -5.0 * length


@pytest.mark.parametrize("max_nodes", [0, 1, 3, 10, 50, 500])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_tasks_own_ceiling_bounds_what_is_left(max_nodes: int, temperature: float) -> None:
    toy = Toy(wide=True)
    task = Ones()
    ceiling = FunctionCeiling(task, toy.actions, vocab_size=VOCAB_SIZE, temperature=temperature)
    tree = PrefixTree(
        (5, 2),
        toy.actions,
        None,
        [NextLogits(toy.model)],
        ceiling,
        vocab_size=VOCAB_SIZE,
        max_nodes=max_nodes,
    )
    support = enumerated(tree)
    left = [z for z in toy.completions() if z not in set(support.completions)]
    log_left = np.logaddexp.reduce([-np.inf, *(task.log_reward(z) / temperature for z in left)])
    assert log_left - 1e-9 <= support.log_left_out_reward
    if max_nodes == 500:
        assert support.log_left_out_reward == -math.inf
    if max_nodes == 50:  # nearly exact, once the few good prefixes are known
        assert support.log_left_out_reward < log_left + 0.1


def test_a_tree_without_a_ceiling_knows_nothing_until_its_end() -> None:
    toy = Toy(max_len=2)
    assert enumerated(toy.tree(bounded=False, max_nodes=5)).log_left_out_reward == math.inf
    assert enumerated(toy.tree(bounded=False)).log_left_out_reward == -math.inf
    assert isinstance(toy.ceiling(), PriorCeiling)
