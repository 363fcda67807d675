"""Supervised fine-tuning: brute force, its optimum, and where its completions come from."""

from collections import Counter

import numpy as np
import pytest
import torch

from buffer.replay import DrawRequest
from cluster.config.file import load_config
from cluster.run.assembly import load_task
from cluster.run.imitation import imitation
from cluster.run.preflight import check_model_and_data
from learner.demonstrations import DemonstrationDraws, NoDemonstrations
from learner.objectives.likelihood import MaximumLikelihood
from tests.learner_toy import STRINGS, make_learner, make_trajectory
from tests.objective_family import gradients, ragged_batch, rows_of
from tests.tabular_toy import Toy, loss_of, make_toy, total_variation


def test_loss_and_gradient_equal_brute_force() -> None:
    batch = ragged_batch(root_stops="mixed")
    loss = loss_of(batch, MaximumLikelihood())
    rows = list(rows_of(batch))
    log_qs = [row.path(0, row.length) + row.log_stop[row.length] for row in rows]
    expected = -torch.stack(log_qs).mean()
    torch.testing.assert_close(loss, expected)
    for mine, brute in zip(gradients(loss, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(mine, brute)


@pytest.mark.parametrize("toy", [make_toy(0), make_toy(2, tool=True)], ids=["plain", "tool"])
def test_its_optimum_is_the_empirical_distribution(toy: Toy) -> None:
    # Rewards say otherwise, and do not enter.
    shown = [0, 1, 1, 2, 2, 2, len(toy.strings) - 1]
    logits_N3 = torch.zeros(len(toy.prefixes), 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits_N3], lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(toy.batch(logits_N3, shown), MaximumLikelihood()).backward()
        optimizer.step()
    counts = Counter(shown)
    share = torch.tensor([counts[row] / len(shown) for row in range(len(toy.strings))]).double()
    assert total_variation(toy.log_policy(logits_N3), share.log()) < 0.01


def test_a_draw_shows_every_demonstration_before_any_comes_again() -> None:
    demonstrations = [
        make_trajectory("short", string, behaviour="demonstration") for string in STRINGS
    ]
    draws = DemonstrationDraws(demonstrations, rows=2 * len(STRINGS) + 3)

    def draw(seed: int) -> list[str]:
        groups = draws.draw(
            DrawRequest(
                num_groups=1,
                num_replayed=0,
                version=9,
                rng=np.random.default_rng(seed),
                timeout_s=0.0,
            )
        )
        assert all(len(group.fresh) == 1 and not group.replayed for group in groups)
        return [group.fresh[0].id for group in groups]

    times = Counter(draw(0))
    assert set(times.values()) == {2, 3} and sum(times.values()) == 2 * len(STRINGS) + 3
    assert draw(0) == draw(0) != draw(1)  # a function of the learner's generator: runs resume


def test_the_learner_imitates_and_reports_neither_rewards_nor_ages() -> None:
    shown = [make_trajectory("short", string, behaviour="demonstration") for string in STRINGS[:2]]
    learner, _ = make_learner(
        objective=MaximumLikelihood(), replay=DemonstrationDraws(shown, rows=6), learning_rate=0.05
    )
    rows = [learner.step() for _ in range(60)]
    assert rows[-1]["loss/value"] == pytest.approx(np.log(2), abs=0.05)  # two, equally often
    assert rows[0]["batch/trajectories"] == 6
    assert not {"reward/log_mean_nats", "policy/age_mean_versions"} & rows[0].keys()
    assert rows[0]["tokens/sampled"] == rows[0]["tokens/scored"] == 0
    tokens = sum(t.prompt.size + t.completion.size for t in shown)
    assert rows[0]["tokens/learned"] == tokens  # each distinct row passes through the model once


def test_a_run_draws_the_tasks_demonstrations_and_nothing_else() -> None:
    config = load_config("tasks/arithmetic.toml", ["learner.objective=sft"])
    assert config.rollout_actors == config.reward_replicas == 0
    base, task = load_task(config)
    groups = imitation(config, base, task).replay.draw(
        DrawRequest(
            num_groups=8,
            num_replayed=2,
            version=0,
            rng=np.random.default_rng(0),
            timeout_s=0.0,
            stop=lambda: False,
        )
    )
    rows_of_others = config.learner.groups_per_step * (
        config.actors.group_size + config.learner.replayed_per_group
    )
    assert len(groups) == rows_of_others
    known = {d.completion for d in task.demonstrations}
    assert {tuple(g.fresh[0].completion.tolist()) for g in groups} <= known


def test_a_task_without_demonstrations_is_refused_before_anything_starts() -> None:
    config = load_config("tasks/toy.toml", ["learner.objective=sft"])
    with pytest.raises(NoDemonstrations, match="this task has none"):
        check_model_and_data(config)
