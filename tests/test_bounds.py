"""Bounds of log Z against exact values: of written-down distributions, and of enumerable LMs."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from tasks.posterior.bounds import (
    FEWEST,
    Bounds,
    Interval,
    UnusableWeights,
    bound_log_z,
)
from tasks.posterior.weights import Completed, draw_log_weights, log_probs, log_rewards, log_weights
from tests.bounds_toy import LEGAL, OUTSIDE, log_sum, make_toy, normalised

Floats = NDArray[np.float64]

# A sampler q and rewards that are known exactly; q is wrong, but nowhere blind.
Q = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
LOG_R = np.log(np.array([0.08, 0.03, 0.05, 0.02, 0.01, 0.012])) - 30.0
LOG_WEIGHT = LOG_R - np.log(Q)
LOG_Z = log_sum(LOG_R)
P = normalised(LOG_R)
KL_Q_P = float((Q * (np.log(Q) - np.log(P))).sum())
KL_P_Q = float((P * (np.log(P) - np.log(Q))).sum())
ESS_SHARE = 1 / float((P**2 / Q).sum())


def exact_iwae(log_weight: Floats, q: Floats, k: int) -> float:
    """E[log mean of K weights], over all K-tuples of strings."""
    total = 0.0
    for chosen in itertools.product(range(len(q)), repeat=k):
        indices = list(chosen)
        total += float(q[indices].prod()) * (log_sum(log_weight[indices]) - np.log(k))
    return total


def simulated(seed: int, *, samples: int = 300, posterior: int = 200) -> Bounds:
    rng = np.random.default_rng(seed)
    return bound_log_z(
        LOG_WEIGHT[rng.choice(len(Q), size=samples, p=Q)],
        sizes=(1, 2, 4),
        log_posterior_weight_M=LOG_WEIGHT[rng.choice(len(Q), size=posterior, p=P)],
        rng=rng,
    )


def known(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


def covers(interval: Interval | None, truth: float) -> bool:
    return known(interval).low <= truth <= known(interval).high


TRUTHS: list[tuple[str, Callable[[Bounds], Interval | None], float]] = [
    ("elbo", lambda bounds: bounds.elbo, LOG_Z - KL_Q_P),
    ("iwae 2", lambda bounds: bounds.iwae[2], exact_iwae(LOG_WEIGHT, Q, 2)),
    ("iwae 4", lambda bounds: bounds.iwae[4], exact_iwae(LOG_WEIGHT, Q, 4)),
    ("log z", lambda bounds: bounds.log_z, LOG_Z),
    ("ess", lambda bounds: bounds.ess_share, ESS_SHARE),
    ("eubo", lambda bounds: bounds.eubo, LOG_Z + KL_P_Q),
    ("posterior ess", lambda bounds: bounds.posterior_ess_share, ESS_SHARE),
    ("kl(q||p) >=", lambda b: b.kl_q_p_at_least, exact_iwae(LOG_WEIGHT, Q, 4) - LOG_Z + KL_Q_P),
    ("kl(q||p) <=", lambda bounds: bounds.kl_q_p_at_most, KL_P_Q + KL_Q_P),
    ("kl(p||q) <=", lambda b: b.kl_p_q_at_most, LOG_Z + KL_P_Q - exact_iwae(LOG_WEIGHT, Q, 4)),
]


def test_every_interval_holds_the_truth_in_about_95_of_100_experiments() -> None:
    experiments = [simulated(seed) for seed in range(200)]
    for name, read, truth in TRUTHS:
        share = sum(covers(read(bounds), truth) for bounds in experiments) / len(experiments)
        assert 0.91 <= share <= 0.985, f"{name} is covered in {share:.1%}"


def test_large_samples_give_the_exact_values_in_the_right_order() -> None:
    bounds = simulated(0, samples=15_000, posterior=15_000)
    for name, read, truth in TRUTHS:
        assert known(read(bounds)).value == pytest.approx(truth, abs=0.03), name
    values = [bounds.iwae[k].value for k in (1, 2, 4)]
    assert bounds.elbo.value == values[0] < values[1] < values[2] < LOG_Z
    assert known(bounds.eubo).value > LOG_Z


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_iwae_of_two_strings_equals_its_expectation_over_all_tuples(k: int) -> None:
    q, log_r = np.array([0.9, 0.1]), np.array([-5.0, -4.0])
    log_weight = log_r - np.log(q)
    binomial = sum(
        exact_probability * (log_sum(log_weight[[0] * (k - n) + [1] * n]) - np.log(k))
        for n, exact_probability in enumerate(binom.pmf(range(k + 1), k, 0.1))
    )
    assert exact_iwae(log_weight, q, k) == pytest.approx(binomial)
    rng = np.random.default_rng(k)
    drawn = log_weight[rng.choice(2, size=8_000, p=q)]
    assert covers(bound_log_z(drawn, sizes=(k,), rng=rng).iwae[k], binomial)


def test_a_perfect_sampler_is_at_distance_zero() -> None:
    bounds = bound_log_z(
        np.full(100, -31.25),
        sizes=(4,),
        log_posterior_weight_M=np.full(50, -31.25),
        rng=np.random.default_rng(0),
    )
    assert bounds.elbo == bounds.iwae[4] == bounds.log_z == bounds.eubo
    assert bounds.elbo == Interval(-31.25, -31.25, -31.25)
    assert bounds.ess_share == bounds.posterior_ess_share == Interval(1.0, 1.0, 1.0)
    assert bounds.kl_q_p_at_least == bounds.kl_q_p_at_most == Interval(0.0, 0.0, 0.0)


def test_only_posterior_samples_see_a_mode_that_q_misses() -> None:
    rng = np.random.default_rng(0)
    q = np.array([1 - 1e-9, 1e-9])
    log_weight = np.log(0.5) - np.log(q)
    bounds = bound_log_z(
        log_weight[rng.choice(2, size=1000, p=q)],
        sizes=(1, 64),
        log_posterior_weight_M=log_weight[rng.choice(2, size=1000)],
        rng=rng,
    )
    assert bounds.ess_share.low > 0.99 and bounds.log_z.high < np.log(0.51)
    assert known(bounds.posterior_ess_share).high < 1e-6
    assert known(bounds.kl_p_q_at_most).low > 9.0


def test_weights_far_below_and_above_one_stay_finite() -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(0.0, 1.0, 500)
    far, near = (
        bound_log_z(shift + spread, sizes=(8,), rng=np.random.default_rng(1))
        for shift in (-9000.0, 0.0)
    )
    assert far.ess_share.high == pytest.approx(near.ess_share.high)
    assert far.log_z.value == pytest.approx(near.log_z.value - 9000.0, abs=1e-6)


def test_samples_that_hang_together_count_as_one() -> None:
    rng = np.random.default_rng(0)
    posterior = LOG_WEIGHT[rng.choice(len(P), size=300, p=P)]
    drawn = LOG_WEIGHT[rng.choice(len(Q), size=300, p=Q)]

    def bounds(log_weight: Floats, draw: NDArray[np.int64] | None) -> Bounds:
        return bound_log_z(
            drawn,
            sizes=(1,),
            log_posterior_weight_M=log_weight,
            posterior_draw_M=draw,
            rng=np.random.default_rng(1),
        )

    once = bounds(posterior, None)
    repeated = bounds(np.repeat(posterior, 4), np.repeat(np.arange(300) * 7, 4))
    blind = bounds(np.repeat(posterior, 4), None)
    for name in ("eubo", "kl_q_p_at_most", "posterior_ess_share"):
        alone, four = getattr(once, name), getattr(repeated, name)
        assert (four.value, four.low, four.high) == pytest.approx(
            (alone.value, alone.low, alone.high)
        )
    assert width(blind.eubo) == pytest.approx(width(once.eubo) / 2, rel=0.01)


def width(interval: Interval | None) -> float:
    return known(interval).high - known(interval).low


def test_what_too_few_samples_cannot_tell_is_left_out() -> None:
    rng = np.random.default_rng(0)
    log_weight = rng.normal(size=10 * FEWEST)
    bounds = bound_log_z(
        log_weight, sizes=(1, 10, 11), log_posterior_weight_M=log_weight[: FEWEST - 1], rng=rng
    )
    assert sorted(bounds.iwae) == [1, 10]
    assert bounds.posterior_samples == FEWEST - 1
    assert bounds.eubo is bounds.kl_q_p_at_most is bounds.kl_p_q_at_most is None
    assert bounds.posterior_ess_share is None
    assert bound_log_z(log_weight, sizes=(), rng=rng).posterior_samples == 0


def test_a_sample_without_ratio_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UnusableWeights, match="9 samples of q"):
        bound_log_z(np.zeros(9), sizes=(1,), rng=rng)
    with pytest.raises(ValueError, match="1 or more"):
        bound_log_z(np.zeros(10), sizes=(4, 0), rng=rng)
    with pytest.raises(UnusableWeights, match="1 of 20 entries of log_weight_N"):
        bound_log_z(np.append(np.zeros(19), -np.inf), sizes=(1,), rng=rng)
    with pytest.raises(UnusableWeights, match="log_posterior_weight_M"):
        bound_log_z(np.zeros(20), sizes=(1,), log_posterior_weight_M=np.full(20, np.nan), rng=rng)


@pytest.mark.parametrize(("degrees", "quantile"), [(9, 2.2622), (29, 2.0452), (100, 1.9840)])
def test_a_mean_has_the_interval_of_students_tables(degrees: int, quantile: float) -> None:
    log_weight = np.random.default_rng(0).normal(size=degrees + 1)
    elbo = bound_log_z(log_weight, sizes=(1,), rng=np.random.default_rng(1)).elbo
    half = quantile * log_weight.std(ddof=1) / np.sqrt(degrees + 1)
    assert elbo.high - elbo.value == pytest.approx(half, rel=1e-4)
    assert elbo.value - elbo.low == pytest.approx(half, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tool", [False, True])
@pytest.mark.parametrize("min_len", [0, 2])
def test_bounds_of_a_language_model_agree_with_enumeration(
    tool: bool, min_len: int, temperature: float
) -> None:
    toy = make_toy(tool=tool, min_len=min_len)
    strings, log_q = toy.strings(), toy.log_q()
    log_r = toy.log_r() / temperature
    log_z, p, q = log_sum(log_r), normalised(log_r), np.exp(log_q)
    rng = np.random.default_rng(5)
    sampled = rng.choice(len(strings), size=2000, p=p)

    def log_weight(completions: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
        return log_rewards(completions, toy.prompt, toy.query, toy.log_reward) / temperature

    bounds = bound_log_z(
        draw_log_weights(toy.policy(seed=11).sample, toy.prompt, 2000, log_weight),
        sizes=(1, 8, 64),
        log_posterior_weight_M=log_weights(
            toy.policy_model,
            toy.actions,
            toy.prompt,
            [strings[number] for number in sampled],
            log_weight,
        ),
        rng=rng,
    )
    kl_q_p, kl_p_q = (q * (log_q - log_r + log_z)).sum(), (p * (log_r - log_z - log_q)).sum()
    assert near(bounds.elbo, log_z - kl_q_p)
    assert near(bounds.eubo, log_z + kl_p_q)
    assert near(bounds.log_z, log_z)
    assert near(bounds.ess_share, 1 / (p**2 / q).sum())
    assert near(bounds.posterior_ess_share, 1 / (p**2 / q).sum())
    assert bounds.elbo.value < bounds.iwae[8].value < bounds.iwae[64].value < bounds.log_z.high
    assert widened(bounds.kl_q_p_at_least).low <= kl_q_p <= widened(bounds.kl_q_p_at_most).high
    assert kl_p_q <= widened(bounds.kl_p_q_at_most).high


def near(interval: Interval | None, truth: float) -> bool:
    return widened(interval).low <= truth <= widened(interval).high


def widened(interval: Interval | None) -> Interval:
    """One and a half times as wide: one of many checks must not fail by chance."""
    value, low, high = known(interval).value, known(interval).low, known(interval).high
    return Interval(value, value + 1.5 * (low - value), value + 1.5 * (high - value))


@pytest.mark.parametrize("tool", [False, True])
@pytest.mark.parametrize("min_len", [0, 2])
def test_log_q_and_log_r_of_given_completions_equal_brute_force(tool: bool, min_len: int) -> None:
    toy = make_toy(tool=tool, min_len=min_len)
    strings = [string for string in toy.strings() for _ in range(2)]
    log_q = log_probs(toy.policy_model, toy.actions, toy.prompt, strings)
    np.testing.assert_allclose(log_q, np.repeat(toy.log_q(), 2), atol=1e-4)
    assert np.exp(log_q[::2]).sum() == pytest.approx(1.0, abs=1e-4)
    texts = [string.tokens for string in strings]
    log_r = log_rewards(texts, toy.prompt, toy.query, toy.log_reward)
    np.testing.assert_allclose(log_r, np.repeat(toy.log_r(), 2), atol=1e-4)


def test_log_weights_of_completions_that_end_at_once() -> None:
    toy = make_toy()
    empty = Completed(tokens=(), from_tool=())
    assert toy.strings()[0] == empty and LEGAL[0] != OUTSIDE
    found = log_probs(toy.policy_model, toy.actions, toy.prompt, [empty])
    np.testing.assert_allclose(found, toy.log_q()[:1], atol=1e-4)
