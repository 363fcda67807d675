"""Free texts of the LM, read as Z Y, against the posterior that brute force knows."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from tasks.posterior import rejection
from tasks.posterior.bounds import Interval, bound_log_z
from tasks.posterior.rejection import (
    NoRejectionSampling,
    PosteriorSamples,
    Reader,
    posterior_samples,
)
from tasks.posterior.weights import log_rewards, log_weights
from tests.bounds_toy import LEGAL, OUTSIDE, STOP, VOCAB_SIZE, Toy, log_sum, make_toy, normalised

# One begins with no legal token, so that a text fits in one way at most. One is legal, so that it
# fits in several. One overlaps itself. One begins with the token that the sampler stops by.
ANSWERS = [(OUTSIDE,), (2,), (1, 1), (STOP, OUTSIDE)]


def draw(toy: Toy, draws: int, seed: int = 0) -> PosteriorSamples:
    return posterior_samples(
        toy.frozen,
        toy.prompt,
        actions=toy.actions,
        tool=toy.tool,
        query=toy.query,
        draws=draws,
        max_rows=512,
        generator=torch.Generator().manual_seed(seed),
    )


def counted(toy: Toy, samples: PosteriorSamples) -> NDArray[np.int64]:
    """How often each legal string was drawn; fails for a string that is none."""
    counts = Counter(samples.completions)
    strings = toy.strings()
    assert counts.keys() <= set(strings)
    return np.array([counts[string] for string in strings])


def chi_square(count: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    expected = count.sum() * p
    return float((np.square(count - expected) / expected).sum())


def unlikely_chi_square(size: int, p: NDArray[np.float64]) -> float:
    """What a sample of p exceeds about once in a thousand times; simulated, for rare strings."""
    rng = np.random.default_rng(0)
    return max(chi_square(rng.multinomial(size, p), p) for _ in range(1000))


@pytest.mark.parametrize("tool", [False, True])
@pytest.mark.parametrize("min_len", [0, 2])
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_text_is_read_in_every_way_that_there_is(
    answer: tuple[int, ...], min_len: int, tool: bool
) -> None:
    toy = make_toy(tool=tool, min_len=min_len, max_len=2, answer=answer)
    strings = toy.strings()
    for text in itertools.product(range(VOCAB_SIZE), repeat=5):
        reading = Reader(toy.actions, toy.tool, answer).read(text)
        beginnings = {
            string
            for string in strings
            if text[: len(string.tokens) + len(answer)] == (*string.tokens, *answer)
        }
        assert len(reading.found) == len(set(reading.found)) and set(reading.found) == beginnings
        # Longest Z, the tool's text behind its last token included, and Y.
        assert not reading.open or len(answer) + 2 + 2 * tool > 5


@pytest.mark.parametrize("tool", [False, True])
@pytest.mark.parametrize("min_len", [0, 2])
@pytest.mark.parametrize("answer", [(OUTSIDE,), (STOP, OUTSIDE)])
def test_samples_are_distributed_as_the_posterior(
    answer: tuple[int, ...], min_len: int, tool: bool
) -> None:
    toy = make_toy(tool=tool, min_len=min_len, answer=answer)
    samples = draw(toy, draws=3000)
    assert len(np.unique(samples.draw_M)) == len(samples.draw_M)  # hence independent
    count, p = counted(toy, samples), normalised(toy.log_r())
    assert chi_square(count, p) < unlikely_chi_square(int(count.sum()), p)
    assert near(samples.log_z, log_sum(toy.log_r()))


@pytest.mark.parametrize("tool", [False, True])
@pytest.mark.parametrize("min_len", [0, 2])
@pytest.mark.parametrize("answer", [(2,), (1, 1)])
def test_texts_that_fit_in_several_ways_count_in_each(
    answer: tuple[int, ...], min_len: int, tool: bool
) -> None:
    toy = make_toy(tool=tool, min_len=min_len, answer=answer)
    samples = draw(toy, draws=3000)
    assert len(np.unique(samples.draw_M)) < len(samples.draw_M)
    expected = 3000 * np.exp(toy.log_r())
    deviation = (counted(toy, samples) - expected) / np.sqrt(expected)
    frequent = expected >= 10
    assert frequent.sum() >= 5 and np.abs(deviation[frequent]).max() < 4
    assert near(samples.log_z, log_sum(toy.log_r()))


def near(interval: Interval | None, truth: float) -> bool:
    """Within 1.5 times the 95 % interval: one of many must not fail by chance."""
    assert interval is not None
    half = 1.5 * (interval.high - interval.value)
    return abs(interval.value - truth) < half < 0.7


def test_where_texts_are_cut_into_pieces_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy(tool=True, answer=(1, 1))
    monkeypatch.setattr(rejection, "CHUNK", 1)
    samples = draw(toy, draws=3000)
    expected = 3000 * np.exp(toy.log_r())
    deviation = (counted(toy, samples) - expected) / np.sqrt(expected)
    assert np.abs(deviation[expected >= 10]).max() < 4


def test_a_stop_reward_is_sampled_by_texts_that_stop() -> None:
    toy = make_toy(query=RewardQuery(kind="stop", stop_token=STOP, context=(4,)))
    samples = draw(toy, draws=3000)
    count, p = counted(toy, samples), normalised(toy.log_r())
    assert chi_square(count, p) < unlikely_chi_square(int(count.sum()), p)
    assert near(samples.log_z, log_sum(toy.log_r()))


def test_stops_behind_a_tool_alone_are_respected() -> None:
    toy = make_toy(tool=True)
    actions = ActionSpace(
        stop_token=STOP, legal_tokens=LEGAL, min_len=1, max_len=3, stop_after_tool=True
    )
    strings = toy.strings()
    for text in itertools.product(range(VOCAB_SIZE), repeat=5):
        reading = Reader(actions, toy.tool, (1,)).read(text)
        for found in reading.found:
            actions.check(found.tokens, found.from_tool)
        expected = {
            string
            for string in strings
            if text[: len(string.tokens) + 1] == (*string.tokens, 1)
            and string.tokens
            and (string.from_tool[-1] or len(string.tokens) >= 3)
        }
        assert set(reading.found) == expected


def test_intervals_of_log_z_hold_it_in_95_of_100_experiments() -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.9, 0.06, 0.03, 0.01])  # 0 to 3 ways to read a text
    truth = np.log(p @ np.arange(4))
    intervals = [rejection.log_mean(rng.choice(4, size=400, p=p).tolist()) for _ in range(1000)]
    share = np.mean([i is not None and i.low <= truth <= i.high for i in intervals])
    assert 0.93 <= share <= 0.97


def test_eubo_of_rejection_samples_is_log_z_and_kl() -> None:
    toy = make_toy(answer=(2,))
    samples = draw(toy, draws=4000)
    log_weight = log_weights(
        toy.policy_model,
        toy.actions,
        toy.prompt,
        samples.completions,
        lambda texts: log_rewards(texts, toy.prompt, toy.query, toy.log_reward),
    )
    bounds = bound_log_z(
        np.zeros(10),
        sizes=(),
        log_posterior_weight_M=log_weight,
        posterior_draw_M=samples.draw_M,
        rng=np.random.default_rng(0),
    )
    log_r, log_q = toy.log_r(), toy.log_q()
    p = normalised(log_r)
    assert near(bounds.eubo, float((p * (log_r - log_q)).sum()))


def test_where_nothing_fits_there_are_no_samples() -> None:
    toy = make_toy(answer=(OUTSIDE,) * 9)
    samples = draw(toy, draws=50)
    assert samples.completions == () and samples.draw_M.size == 0
    assert samples.draws == 50 and samples.log_z is None


def test_what_cannot_be_sampled_so_is_refused() -> None:
    with pytest.raises(NoRejectionSampling):
        draw(make_toy(query=RewardQuery(kind="function", stop_token=STOP)), draws=1)
    with pytest.raises(ValueError, match="the answer Y is empty"):
        Reader(make_toy().actions, None, ())
    long = make_toy(prompt=Prompt(key="k", text="x", prompt=(1,) * 70, answer=(2,)))
    with pytest.raises(ValueError, match="exceeds the 64 tokens"):
        draw(long, draws=1)


def test_a_prompt_that_leaves_little_room_is_sampled_to_the_end_of_the_context() -> None:
    toy = make_toy(
        prompt=Prompt(key="k", text="x", prompt=(1,) * 58, answer=(2,)), max_len=3, context=(4, 2)
    )
    assert near(draw(toy, draws=1000).log_z, log_sum(toy.log_r()))
