"""Bounds that are logged during training, against hand-computed values."""

from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffer.replay import Group
from buffer.trajectory import Trajectory
from cluster.reports.plots import draw_curves
from cluster.run.directory import first_state
from cluster.run.display import known
from learner.step_metrics import describe_quality
from tests.learner_toy import ACTIONS, FixedReplay, make_learner, make_trajectory


def weighted(
    log_reward: float, log_q: Sequence[float], log_stop: float, key: str = "short", **changes: Any
) -> Trajectory:
    """A string of as many tokens as `log_q` has, with these records at its end.

    What stands at earlier stop states must not enter.
    """
    stops = ACTIONS.stop_positions([1] * len(log_q), [False] * len(log_q))
    earlier = len(stops) - 1
    return make_trajectory(
        key,
        [1] * len(log_q),
        log_reward=np.array([77.0] * earlier + [log_reward], dtype=np.float32),
        behaviour_log_prob=np.array(log_q, dtype=np.float32),
        behaviour_log_stop=np.array([-55.0] * earlier + [log_stop], dtype=np.float32),
        **changes,
    )


def group(*fresh: Trajectory, replayed: Sequence[Trajectory] = ()) -> Group:
    return Group(prompt_key=fresh[0].prompt_key, fresh=fresh, replayed=tuple(replayed))


# log w = -6 + 1.5 = -4.5 and -8 + 3 = -5 at T = 1.
PAIR = (weighted(-6.0, [-0.5, -0.75], -0.25), weighted(-8.0, [-2.0], -1.0))
TEMPERED: dict[str, Any] = {"behaviour": "tempered", "temperature": 2.0}


def test_a_group_gives_its_bounds() -> None:
    first, second = exp(-4.5), exp(-5.0)
    iwae = log((first + second) / 2)
    assert describe_quality([group(*PAIR)], 1.0) == pytest.approx(
        {
            "posterior/elbo_nats": -4.75,
            "posterior/iwae_nats": iwae,
            "posterior/iwae_gap_nats": iwae + 4.75,
            "posterior/ess_share": (first + second) ** 2 / (2 * (first**2 + second**2)),
        }
    )


def test_the_reward_alone_is_tempered() -> None:
    assert describe_quality([group(*PAIR)], 2.0)["posterior/elbo_nats"] == pytest.approx(
        ((-3.0 + 1.5) + (-4.0 + 3.0)) / 2
    )


def test_prompts_count_alike_whatever_the_size_of_their_groups() -> None:
    far = weighted(-20.0, [-1.0], 0.0, key="other")
    metrics = describe_quality([group(*PAIR), group(far, far, far)], 1.0)
    assert metrics["posterior/elbo_nats"] == pytest.approx((-4.75 - 19.0) / 2)
    assert metrics["posterior/ess_share"] == pytest.approx(
        (describe_quality([group(*PAIR)], 1.0)["posterior/ess_share"] + 1.0) / 2
    )


def test_only_fresh_trajectories_of_the_policy_itself_count() -> None:
    others = [
        weighted(-1.0, [-0.1], -0.1, **TEMPERED),
        weighted(-1.0, [-0.1], -0.1, behaviour="demonstration"),
    ]
    mixed = group(others[0], PAIR[0], others[1], PAIR[1], replayed=[PAIR[0], others[0]])
    alone = describe_quality([group(*PAIR)], 1.0)
    assert describe_quality([mixed, group(*others)], 1.0) == alone
    assert describe_quality([group(*others)], 1.0) == {}


def test_a_group_of_one_counts_in_the_elbo_only() -> None:
    lone = weighted(-3.0, [-1.0], 0.0, key="other")
    assert describe_quality([group(lone)], 1.0) == {"posterior/elbo_nats": pytest.approx(-2.0)}
    alone = describe_quality([group(*PAIR)], 1.0)
    beside = describe_quality([group(*PAIR), group(lone)], 1.0)
    assert beside["posterior/elbo_nats"] == pytest.approx((-4.75 - 2.0) / 2)
    del alone["posterior/elbo_nats"], beside["posterior/elbo_nats"]
    assert beside == alone


def test_log_weights_far_below_zero_keep_their_differences() -> None:
    deep = [weighted(-9000.0 - shift, [-1.0], 0.0) for shift in (0.0, 1.0)]
    metrics = describe_quality([group(*deep)], 1.0)
    assert metrics["posterior/iwae_gap_nats"] == pytest.approx(log((1 + exp(-1)) / 2) + 0.5)


def test_the_learner_logs_them_at_the_temperature_of_the_step() -> None:
    learner, _ = make_learner(
        replay=FixedReplay([group(*PAIR)]),
        reward_temperature={"start": 2.0, "end": 1.0, "steps": 1},
    )
    rows = [learner.step(), learner.step()]
    elbo = [row["posterior/elbo_nats"] for row in rows]
    assert elbo == pytest.approx([-1.25, -4.75])
    assert rows[0].keys() >= {"posterior/iwae_gap_nats", "posterior/ess_share", "loss/value"}


def test_what_is_logged_is_drawn_and_shown(tmp_path: Path) -> None:
    row = describe_quality([group(*PAIR)], 1.0)
    files = draw_curves([{"step": 1.0, **row}], tmp_path)
    assert [file.name for file in files] == ["elbo.png", "iwae_gap.png"]
    state = first_state("r", steps=1).model_copy(update={"metrics": row})
    assert list(known(state)) == [("ELBO", "-4.75 nats")]
