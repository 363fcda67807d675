"""Draws from replay follow softmax of the log-reward, exactly."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from buffer.config import BufferConfig
from buffer.replay import ReplayBuffer, sample_by_priority
from tests.buffer_toy import MakeStore, toy_request, toy_trajectory


def successive_draws(weights: Sequence[float], num_draws: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered outcome when drawing one after another without replacement."""
    law = {}
    for outcome in itertools.permutations(range(len(weights)), num_draws):
        left, probability = sum(weights), 1.0
        for item in outcome:
            probability *= weights[item] / left
            left -= weights[item]
        law[outcome] = probability
    return law


def chi_square(
    counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float], num_draws: int
) -> float:
    return sum((counts[k] - num_draws * p) ** 2 / (num_draws * p) for k, p in law.items())


def test_priorities_follow_softmax_without_replacement() -> None:
    log_reward = np.array([-2.0, -1.0, 0.0, 0.5])
    rng, counts = np.random.default_rng(1), Counter[tuple[int, ...]]()
    for _ in range(20_000):
        picks = sample_by_priority(log_reward, num_draws=2, inverse_temperature=0.7, rng=rng)
        counts[tuple(picks.tolist())] += 1
    law = successive_draws(np.exp(0.7 * log_reward).tolist(), 2)
    assert counts.keys() == law.keys()
    # 11 degrees of freedom: above 31.3 once in a thousand.
    assert chi_square(counts, law, 20_000) < 31.3


def test_the_stored_buffer_is_drawn_by_the_same_law(make_store: MakeStore) -> None:
    config = BufferConfig(inverse_temperature=0.5, max_draws=10**6, near_duplicate_tolerance=0)
    buffer = ReplayBuffer(make_store(), config=config)
    rewards = [-3.0, -1.0, 0.0, 1.0]
    for first in range(20):  # the same four trajectories each time, as twenty groups
        group = [toy_trajectory((i,), log_reward=rewards[i]) for i in range(4)]
        buffer.add([replace(trajectory, created_s=float(first)) for trajectory in group])
    rng, counts = np.random.default_rng(2), Counter[tuple[int, ...]]()
    for _ in range(60):
        groups = buffer.draw(toy_request(20, num_replayed=2, rng=rng))
        counts.update(tuple(int(t.completion[0]) for t in group.replayed) for group in groups)
    law = successive_draws(np.exp(0.5 * np.array(rewards)).tolist(), 2)
    assert counts.keys() <= law.keys()
    assert chi_square(counts, law, 1200) < 31.3
    stats = buffer.stats()
    assert stats.times_sampled_mean == 2 * 1200 / 4
    assert stats.times_sampled_max == max(
        sum(n for outcome, n in counts.items() if item in outcome) for item in range(4)
    )


def test_a_prompt_with_few_trajectories_gives_what_it_has(make_store: MakeStore) -> None:
    buffer = ReplayBuffer(make_store(), config=BufferConfig())
    buffer.add([toy_trajectory((1,)), toy_trajectory((2, 2, 2))])
    rng = np.random.default_rng(0)
    (group,) = buffer.draw(toy_request(1, num_replayed=9, rng=rng))
    assert {tuple(t.completion.tolist()) for t in group.replayed} == {(1,), (2, 2, 2)}
