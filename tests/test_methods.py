"""The names of a comparison's methods, and what each makes of a configuration."""

from pathlib import Path

import pytest

from cluster.config.file import load_config, resolved_toml
from cluster.config.project import UserError
from cluster.config.validation import ConfigError
from cluster.experiments.comparison import Summary
from cluster.experiments.frontier import draw_frontier, likelihoods_of
from cluster.experiments.methods import (
    METHODS,
    Method,
    measured_against,
    method,
    method_config,
)

CONTINUATION = load_config("tasks/continuation.toml")


def test_a_name_says_method_temperature_and_number() -> None:
    assert [method(name) for name in METHODS] == [Method(name, None, 1) for name in METHODS]
    assert method("diverse_beam_5x") == Method("diverse_beam", None, 5)
    assert method("tempered_T0.9_5x") == Method("tempered", 0.9, 5)
    assert method("gflownet_T1") == Method("gflownet", 1.0, 1)
    assert method("sft_tokens") == Method("sft", None, 1, equal_tokens=True)
    assert method("ppo_T0.9_tokens") == Method("ppo", 0.9, 1, equal_tokens=True)
    assert measured_against("ppo_T0.9_tokens") == ("ppo_T0.9", "gflownet_T0.9")


@pytest.mark.parametrize(
    "name",
    [
        "beams",
        "beam_T0.9",
        "gflownet_T0",
        "gflownet_5x",
        "greedy_5x",
        "beam_1x",
        "beam_x",
        "",
        "_",
        "base_tokens",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"no method '{name}'"):
        method(name)


def test_what_is_tuned_for_a_title_wins_over_what_is_for_its_method(tmp_path: Path) -> None:
    tuned = "compare.overrides={ppo=['learner.ppo_kl=1.0'], 'ppo_T0.9'=['learner.ppo_kl=2.0']}"

    shared = load_config("tasks/continuation.toml", [tuned])

    def kl(title: str) -> float:
        return method_config(shared, title=title, seed=0).learner.ppo_kl

    assert (kl("ppo"), kl("ppo_T0.8"), kl("ppo_T0.9"), kl("sft")) == (1.0, 1.0, 2.0, kl("gflownet"))
    config = method_config(shared, title="ppo_T0.9", seed=0)
    (tmp_path / "config.toml").write_text(resolved_toml(config))
    assert load_config(str(tmp_path / "config.toml")) == config
    wrong = ["compare.overrides={gfolwnet=['learner.steps=1']}"]
    with pytest.raises(UserError, match=r"compare\.overrides: no method 'gfolwnet'"):
        method_config(load_config("tasks/continuation.toml", wrong), title="gflownet", seed=0)


def test_ways_of_decoding_differ_in_the_evaluation_alone() -> None:
    base = method_config(CONTINUATION, title="base", seed=1)
    for name in ("sample", "nucleus", "greedy", "beam", "diverse_beam_5x", "tempered"):
        other = method_config(CONTINUATION, title=name, seed=1)
        assert other.model_copy(update={"evaluation": base.evaluation}) == base
    configs = {name: method_config(CONTINUATION, title=name, seed=0) for name in METHODS}
    asked = {name: config.evaluation for name, config in configs.items()}
    assert asked["sample"].temperature == asked["nucleus"].temperature == 1.0
    end = configs["tempered"].learner.reward_temperature.end
    assert asked["tempered"].temperature == end < 1
    assert (asked["nucleus"].top_p, asked["sample"].top_p) == (0.95, 1.0)
    assert (asked["greedy"].decoding, asked["greedy"].samples) == ("beam", 1)
    assert asked["beam"].samples == asked["sample"].samples > 1
    assert asked["diverse_beam"].decoding == "diverse_beam"


def test_temperature_and_number_enter_the_configuration() -> None:
    tempered = method_config(CONTINUATION, title="tempered_T0.9_5x", seed=0)
    assert (tempered.evaluation.temperature, tempered.evaluation.candidates) == (0.9, 5)
    trained = method_config(CONTINUATION, title="gflownet_T0.9", seed=0)
    assert trained.learner.reward_temperature.end == 0.9
    assert trained.evaluation.temperature == 1.0


def test_what_is_not_trained_draws_anew_for_each_seed() -> None:
    seeds = [method_config(CONTINUATION, title="sample", seed=n).evaluation.seed for n in (0, 1)]
    assert seeds[0] != seeds[1]
    trained = [method_config(CONTINUATION, title="ppo", seed=n) for n in (0, 1)]
    assert trained[0].evaluation == trained[1].evaluation


def test_only_sentences_are_decoded_otherwise() -> None:
    with pytest.raises(ConfigError, match='task "toy" with 0 test files writes none'):
        method_config(load_config("tasks/toy.toml"), title="beam", seed=0)
    with pytest.raises(ConfigError, match="infilling, continuation"):
        method_config(load_config("tasks/arithmetic.toml"), title="nucleus", seed=0)
    with pytest.raises(ConfigError, match="0 test files"):
        method_config(CONTINUATION.changed({"task.tests": ()}), title="beam_5x", seed=0)


def test_likelihood_is_drawn_against_diversity_where_both_were_measured(
    tmp_path: Path,
) -> None:
    def row(likely: float, diversity: float) -> dict[str, Summary]:
        return {
            "max_log_likelihood": Summary(mean=likely, std=0.5),
            "mean_log_likelihood": Summary(mean=likely - 2, std=0.4),
            "diversity": Summary(mean=diversity, std=None),
        }

    table = {
        "base": row(-20, 0.8),
        "greedy": row(-12, 0.0),
        "beam": row(-9, 0.3),
        "beam_5x": row(-8, 0.25),
        "gflownet_T0.9": row(-12, 0.8),
        "gflownet": row(-9, 0.7),
    }
    assert likelihoods_of(table) == ["max_log_likelihood", "mean_log_likelihood"]
    assert likelihoods_of({"base": {"tv": Summary(mean=0.1, std=None)}}) == []
    drawn = draw_frontier(table, tmp_path / "frontier.png")
    assert 5_000 < drawn.stat().st_size < 60_000
