"""Traits of the objectives: those of the classes are those that configurations read."""

from typing import get_args

import pytest

from cluster.run.assembly import build_objective
from learner.config import LearnerConfig
from learner.objectives.likelihood import MaximumLikelihood, TextLikelihood
from learner.objectives.traits import TRAITS, ObjectiveName


def configured(objective: str) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {"steps": 1, "groups_per_step": 1, "learning_rate": 1.0, "objective": objective}
    )


def test_every_name_has_traits() -> None:
    assert set(get_args(ObjectiveName)) == TRAITS.keys()


@pytest.mark.parametrize("name", [name for name in TRAITS if not TRAITS[name].imitates])
def test_an_objective_that_is_built_has_the_traits_of_its_name(name: str) -> None:
    config = configured(name)
    assert build_objective(config).traits is config.traits


def test_what_imitates_has_the_traits_of_its_name() -> None:
    assert MaximumLikelihood.traits is TRAITS["sft"] and TextLikelihood.traits is TRAITS["joint"]
