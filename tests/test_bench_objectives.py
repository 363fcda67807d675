"""The bench of the objectives: its cases are runs that exist, and its figures say what was seen."""

import pytest

from bench.objectives import MAX_STEPS, TARGET_TV, Case, all_cases, spread, told, train


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_case_is_a_valid_configuration(case: Case) -> None:
    config = case.config(seed=3)
    assert (config.seed, config.learner.steps) == (3, MAX_STEPS)
    drawn = config.actors.group_size + config.learner.replayed_per_group
    assert drawn * config.learner.groups_per_step == 64


def test_a_run_ends_at_the_first_measurement_that_is_near_enough() -> None:
    distances = iter([0.5, TARGET_TV + 1e-6, TARGET_TV, 0.4])
    outcome = train(lambda: None, lambda: next(distances))
    assert (outcome.steps, outcome.last_tv) == (30, TARGET_TV)


def test_a_run_that_never_comes_near_says_so() -> None:
    outcome = train(lambda: None, lambda: 0.3)
    assert (outcome.steps, outcome.seconds, outcome.last_tv) == (None, None, 0.3)


def test_seeds_that_never_got_there_count_as_slower_than_all_others() -> None:
    assert spread([120, None, 90]) == {"median": 120, "least": 90, "most": None}
    assert spread([None, None, 90]) == {"median": None, "least": 90, "most": None}
    assert told(spread([120, None, 90])) == "120 (90 .. -)"
