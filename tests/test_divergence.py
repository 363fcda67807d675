"""Divergences against closed forms, and what is left out against the whole."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.posterior.divergence import divergence, jensen_shannon, kl, total_variation

Floats = NDArray[np.float64]
weights = st.lists(st.floats(0.01, 10.0), min_size=6, max_size=6)


def logs(*probabilities: float) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


def normalised(values: list[float]) -> Floats:
    return np.array(values) / sum(values)


def direct_kl(a: Floats, b: Floats) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def test_two_coins() -> None:
    q, p = logs(0.5, 0.5), logs(0.9, 0.1)
    found = divergence(q, p)
    assert found.tv == pytest.approx(0.4)
    assert found.kl_q_p == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert found.kl_p_q == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    mixed = 0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3))
    mixed += 0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3))
    assert found.jsd == pytest.approx(mixed)


def test_nothing_is_away_from_itself() -> None:
    p = logs(0.2, 0.3, 0.5)
    found = divergence(p, p)
    assert found.tv == 0.0
    assert (found.kl_q_p, found.kl_p_q, found.jsd) == pytest.approx((0, 0, 0), abs=1e-15)


def test_distributions_without_a_common_string_are_as_far_as_can_be() -> None:
    q, p = logs(1.0, 0.0), logs(0.0, 1.0)
    found = divergence(q, p)
    assert found.tv == 1.0
    assert found.jsd == pytest.approx(math.log(2))
    assert found.kl_q_p == found.kl_p_q == math.inf


def test_a_string_that_only_the_second_has_costs_nothing() -> None:
    assert kl(logs(1.0, 0.0), logs(0.5, 0.5)) == pytest.approx(math.log(2))
    assert kl(logs(0.5, 0.5), logs(1.0, 0.0)) == math.inf


@given(weights, weights)
def test_all_four_follow_their_formulas(q_weights: list[float], p_weights: list[float]) -> None:
    q, p = normalised(q_weights), normalised(p_weights)
    found = divergence(np.log(q), np.log(p))
    m = (q + p) / 2
    assert found.tv == pytest.approx(0.5 * np.abs(q - p).sum())
    assert found.kl_q_p == pytest.approx(direct_kl(q, p), abs=1e-9)
    assert found.kl_p_q == pytest.approx(direct_kl(p, q), abs=1e-9)
    assert found.jsd == pytest.approx((direct_kl(q, m) + direct_kl(p, m)) / 2, abs=1e-9)


@given(weights, weights, st.integers(1, 5))
def test_what_is_left_out_is_counted_as_said(
    q_weights: list[float], p_weights: list[float], kept: int
) -> None:
    q, p = normalised(q_weights), normalised(p_weights)
    left_q, left_p = float(q[kept:].sum()), float(p[kept:].sum())
    inside_p = p[:kept] / p[:kept].sum()
    found = divergence(np.log(q[:kept]), np.log(inside_p), left_out_q=left_q, left_out_p=left_p)
    # tv bounds the distance to the whole posterior ...
    true_tv = 0.5 * float(np.abs(q - p).sum())
    assert true_tv - 1e-9 <= found.tv <= min(1.0, true_tv + 2 * left_p + 1e-9)
    # ... and the others compare with the posterior among the kept, zero elsewhere.
    padded_p = np.append(inside_p, np.zeros(6 - kept))
    m = (q + padded_p) / 2
    assert found.kl_p_q == pytest.approx(direct_kl(padded_p, q), abs=1e-9)
    assert found.jsd == pytest.approx((direct_kl(q, m) + direct_kl(padded_p, m)) / 2, abs=1e-9)
    assert found.kl_q_p == pytest.approx(direct_kl(q[:kept] / q[:kept].sum(), inside_p), abs=1e-9)


def test_a_policy_elsewhere_altogether() -> None:
    q, p = logs(0.0), logs(1.0)
    assert total_variation(q, p, left_out_q=1.0) == 1.0
    assert jensen_shannon(q, p, left_out_q=1.0) == pytest.approx(math.log(2))
