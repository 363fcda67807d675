"""Learning rate and reward temperature as functions of the step, and the settings behind them."""

import pytest
from pydantic import ValidationError

from learner.config import LearnerConfig, RewardTemperatureConfig


def make_config(**changes: object) -> LearnerConfig:
    fields = {"steps": 10, "groups_per_step": 1, "learning_rate": 1.0}
    return LearnerConfig.model_validate(fields | changes)


def test_warm_up_is_linear_and_never_zero() -> None:
    config = make_config(warmup_steps=4)
    assert [config.learning_rate_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert make_config().learning_rate_at(0) == 1.0


def test_linear_decay_ends_above_zero_at_the_last_step() -> None:
    config = make_config(warmup_steps=2, decay="linear")
    rates = [config.learning_rate_at(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx([n / 8 for n in range(8, 0, -1)])


def test_temperature_falls_linearly_and_then_stays() -> None:
    config = RewardTemperatureConfig(start=1.1, end=0.5, steps=3)
    temperatures = [config.at(step) for step in range(6)]
    assert temperatures == pytest.approx([1.1, 0.9, 0.7, 0.5, 0.5, 0.5])


def test_a_schedule_of_no_steps_is_flat() -> None:
    assert RewardTemperatureConfig(start=2.0, end=0.5, steps=0).at(0) == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rat": 0.1},
        {"learning_rate": 0.0},
        {"steps": "many"},
        {"subtb_lambda": 0.0},
        {"normalisation": "token"},
        {"objective": "tb", "normalisation": "trajectory"},
        {"objective": "db", "subtb_lambda": 0.9},
        {"reward_temperature": {"start": 0.0}},
        {"ranks": 2, "starvation_timeout_s": 600.0, "collective_timeout_s": 600.0},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_config(**changes)


@pytest.mark.parametrize(("steps", "last"), [(3, 0.7), (4, 0.5), (9, 0.5)])
def test_the_last_temperature_is_that_of_the_last_update(steps: int, last: float) -> None:
    schedule = RewardTemperatureConfig(start=1.1, end=0.5, steps=3)
    config = make_config(steps=steps, reward_temperature=schedule)
    assert config.trained_temperature() == config.trained_temperature(0) == pytest.approx(last)
    assert config.trained_temperature(2) == pytest.approx(0.9)
