"""Who is moved by more than learning explains: the filter, the test, and both under noise."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from learner.agreement.comparison import Gap, Pair
from learner.agreement.hearing import (
    _AT_FIRST,
    _DRIFT,
    _LEAST_NOISE,
    _LIMIT_NATS,
    _SHIFT,
    _SLOPE,
    _SLOPE_DRIFT,
    _SLOPE_SPREAD,
    Hearing,
)

# Of a completion of arithmetic on the seed LM, given its group, and of a group of six; measured.
ROW_SPREAD, GROUP_SPREAD = 0.55, 0.3
GROUP = 6


def test_the_belief_is_the_posterior_of_all_that_was_seen() -> None:
    rng = np.random.default_rng(0)
    steps, belief = 5, _AT_FIRST
    # All levels and slopes as one Gaussian vector, conditioned on all observations at once.
    mean = np.array([0.0] * steps + [_SLOPE] * steps)
    order = np.minimum.outer(np.arange(steps), np.arange(steps))
    covariance = np.zeros((2 * steps, 2 * steps))
    covariance[:steps, :steps] = 1e4 + _DRIFT**2 * order
    covariance[steps:, steps:] = _SLOPE_SPREAD**2 + _SLOPE_DRIFT**2 * order
    rows, seen, variances = [], [], []
    for step in range(steps):
        belief = belief.later(1) if step else belief
        for _ in range(3):
            log_age, x, weight = math.log(rng.integers(1, 6)), rng.normal(-4), rng.uniform(1, 9)
            belief = belief.seeing(log_age, x, weight).seeing(0.3, 7.0, 2.0).seeing(0.3, 7.0, -2.0)
            rows.append(np.zeros(2 * steps))
            rows[-1][[step, steps + step]] = 1.0, log_age
            seen.append(x)
            variances.append(1 / weight)
    design = np.array(rows)
    gain = (
        covariance @ design.T @ np.linalg.inv(design @ covariance @ design.T + np.diag(variances))
    )
    posterior = mean + gain @ (np.array(seen) - design @ mean)
    left = covariance - gain @ design @ covariance
    for log_age in (0.0, 0.5, 2.0):
        asked = np.zeros(2 * steps)
        asked[[steps - 1, 2 * steps - 1]] = 1.0, log_age
        expected, variance = belief.expects(log_age)
        assert expected == pytest.approx(asked @ posterior, abs=1e-3)
        assert variance == pytest.approx(asked @ left @ asked, rel=1e-3)


def gap(moved: float, *, fresh: int = GROUP) -> Gap:
    return Gap(10 * fresh, rms_nats=0.1, mean_nats=0.0, fresh=fresh, moved=moved)


def test_the_evidence_is_that_of_the_change_that_speaks_most_for_itself() -> None:
    hearing, evidence, of_steps = Hearing(), [], []
    rng = np.random.default_rng(1)
    for step in range(1, 60):
        belief, noise = hearing._belief.later(1), hearing._noise
        x = -4 + 0.3 * rng.normal() + 0.2 * (step > 30)
        expected, variance = belief.expects(0.0)
        variance += noise / GROUP
        likelihoods = [-((x - expected - shift) ** 2) / (2 * variance) for shift in (_SHIFT, 0.0)]
        of_steps.append(likelihoods[0] - likelihoods[1])
        hearing.take({("a", step - 1): gap(x)}, step)
        evidence.append(hearing._doubts["a"].nats)
    brute = [
        max(0.0, *(sum(of_steps[begun : end + 1]) for begun in range(end + 1)))
        for end in range(len(of_steps))
    ]
    assert max(brute) > 1.0
    np.testing.assert_allclose(evidence, brute, atol=1e-6)


Moved = Callable[[int, int], float]  # of the actor and the step: versions by which it is late


def simulate(
    late: Moved, *, steps: int, seed: int, age: Callable[[int, int], int], slope: float = 0.9
) -> list[tuple[int, str]]:
    """Four actors, a group of each in every step; who was thought to have changed, and when."""
    rng = np.random.default_rng(seed)
    hearing, level, alarms = Hearing(), -4.0, []
    for step in range(10, 10 + steps):
        level += 0.15 * rng.normal()
        gaps: dict[Pair, Gap] = {}
        for actor in range(4):
            claimed = age(actor, step)
            true = claimed + late(actor, step)
            noise = GROUP_SPREAD * rng.normal() + ROW_SPREAD * rng.normal(size=GROUP).mean()
            gaps[f"a{actor}", step - claimed] = gap(level + slope * math.log(true) + noise)
        for changed in hearing.take(gaps, step):
            alarms.append((step - 10, changed))
            hearing.forget(changed)
    return alarms


@pytest.mark.parametrize("slope", [0.5, 0.9])
def test_honest_actors_of_any_age_are_seldom_thought_to_have_changed(slope: float) -> None:
    alarms = simulate(
        lambda *_: 0.0,
        steps=1000,
        seed=2,
        age=lambda actor, step: 1 + (7 * actor + step * step) % 5,
        slope=slope,
    )
    assert len(alarms) <= 0.02 * 4 * 1000


def test_adapters_that_are_one_version_late_are_found_within_few_trajectories() -> None:
    def trajectories(seed: int) -> int:
        late = simulate(
            lambda actor, step: float(actor == 2 and step >= 60),
            steps=120,
            seed=seed,
            age=lambda *_: 1,
        )
        return GROUP * min((step - 49 for step, actor in late if actor == "a2" and step >= 50))

    needed = [trajectories(seed) for seed in range(40)]
    assert np.median(needed) <= 20
    assert np.percentile(needed, 90) <= 60


def test_what_all_do_at_once_is_the_pace_of_learning_and_what_one_does_is_not() -> None:
    for moved, changed in ((0.5, []), (1.5, ["a2"])):
        hearing = Hearing()
        for step in range(2, 30):
            assert not hearing.take({(f"a{n}", step - 1): gap(-4.0) for n in range(4)}, step)
        heard = {(f"a{n}", 29): gap(-3.5 if n != 2 else -4.0 + moved) for n in range(4)}
        assert list(hearing.take(heard, 30)) == changed


def test_not_a_number_is_a_change_and_what_is_not_fresh_says_nothing() -> None:
    hearing = Hearing()
    nan = float("nan")
    assert hearing.take({("a", 3): gap(nan), ("b", 3): gap(-4.0)}, 5) == {"a": 3}
    assert not hearing.take({("b", 3): gap(nan, fresh=0), ("c", 6): gap(9.0)}, 6)
    for step in range(6, 20):
        assert set(hearing.take({("b", step - 1): gap(-4.0)}, step)) == set()
    assert hearing._doubts["b"].nats < _LIMIT_NATS


@pytest.mark.parametrize("noise, age, steps", [(0.5, 1, 5000), (1e-30, 3, 50)])
def test_what_hardly_varies_leaves_every_number_finite(noise: float, age: int, steps: int) -> None:
    hearing = Hearing()
    belief = _AT_FIRST.seeing(math.log(age), -4.0, 24 / noise)
    hearing.restore(belief, 0, [noise, 0.02], {})
    for step in range(5, 5 + steps):
        assert not hearing.take({("a", step - age): gap(-4.0, fresh=24)}, step)
    assert hearing._noise >= _LEAST_NOISE
    assert all(map(math.isfinite, (*hearing._belief, hearing._doubts["a"].nats)))
    # Whom it doubts it still says.
    late = {("a", 5 + steps - age): gap(-2.0, fresh=24)}
    assert set(hearing.take(late, 5 + steps)) == {"a"}
