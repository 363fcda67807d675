"""Potentials and residuals of a recorded trajectory against their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buffer.trajectory import Trajectory
from cluster.inspector.detail import estimate_log_z, potentials, prefixes_of
from learner.objectives.base import ObjectiveInput
from learner.objectives.potential import log_z_of, state_potentials
from tests.buffer_toy import toy_trajectory


@st.composite
def recorded(draw: st.DrawFn) -> Trajectory:
    """Any trajectory that a policy with a tool could have left."""
    length = draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    from_tool = rng.random(length) < 0.3
    open_ = [t for t in range(length) if not from_tool[t] and rng.random() < 0.7]
    stops = np.array([*open_, length], np.int32)
    return replace(
        toy_trajectory(rng.integers(0, 50, length).tolist()),
        from_tool=from_tool,
        stops=stops,
        log_reward=-(20 * rng.random(stops.size)).astype(np.float32),
        behaviour_log_prob=np.where(from_tool, 0.0, -3 * rng.random(length)).astype(np.float32),
        behaviour_log_stop=-(2 * rng.random(stops.size)).astype(np.float32),
    )


@given(trajectory=recorded(), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_every_prefix_is_as_its_definition_says(trajectory: Trajectory, temperature: float) -> None:
    prefixes = prefixes_of(trajectory, temperature=temperature, log_z=-4.0)
    assert [prefix.length for prefix in prefixes] == trajectory.stops.tolist()
    before = None if trajectory.stops[0] == 0 else 4.0  # the root's potential is -log Z
    for s, prefix in enumerate(prefixes):
        path = sum(float(trajectory.behaviour_log_prob[k]) for k in range(prefix.length))
        log_reward, stop = float(trajectory.log_reward[s]), float(trajectory.behaviour_log_stop[s])
        phi = path + stop - log_reward / temperature
        assert (prefix.log_reward, prefix.log_q_stop) == (log_reward, stop)
        assert prefix.log_path == pytest.approx(path, abs=1e-9)
        assert prefix.potential == pytest.approx(phi, abs=1e-9)
        if before is None:
            assert prefix.residual is None
        else:
            assert prefix.residual == pytest.approx(phi - before, abs=1e-9)
        before = phi


def test_under_the_posterior_every_potential_is_minus_log_z_and_no_residual_is_left() -> None:
    # A chain of states, each with one child: F(t) = R(t) + F(t + 1), q(stop | t) = R(t) / F(t).
    rng = np.random.default_rng(0)
    log_reward_S = -3 * rng.random(6)
    log_flow_S = np.logaddexp.accumulate(log_reward_S[::-1])[::-1]
    trajectory = replace(
        toy_trajectory((1, 2, 3, 4, 5)),
        log_reward=log_reward_S.astype(np.float32),
        behaviour_log_stop=(log_reward_S - log_flow_S).astype(np.float32),
        behaviour_log_prob=(log_flow_S[1:] - log_flow_S[:-1]).astype(np.float32),
    )
    log_z = float(log_flow_S[0])
    np.testing.assert_allclose(potentials(trajectory, temperature=1.0), -log_z, atol=1e-5)
    assert estimate_log_z([trajectory], temperature=1.0) == pytest.approx(log_z, abs=1e-5)
    prefixes = prefixes_of(trajectory, temperature=1.0, log_z=log_z)
    residuals = [prefix.residual for prefix in prefixes]
    assert residuals[0] is None
    assert residuals[1:] == pytest.approx([0.0] * 5, abs=1e-5)


@given(trajectories=st.lists(recorded(), min_size=1, max_size=4))
def test_potentials_and_log_z_are_those_that_the_learner_computes(
    trajectories: list[Trajectory],
) -> None:
    temperature, width = 0.5, max(t.completion.size for t in trajectories)
    rows = len(trajectories)
    batch = ObjectiveInput(
        log_pf_BT=torch.zeros(rows, width, dtype=torch.float64),
        log_stop_BS=torch.zeros(rows, width + 1, dtype=torch.float64),
        log_reward_BS=torch.zeros(rows, width + 1, dtype=torch.float64),
        stop_BS=torch.zeros(rows, width + 1, dtype=torch.bool),
        group_B=torch.zeros(rows, dtype=torch.int64),
    )
    for row, t in enumerate(trajectories):
        stops = torch.from_numpy(t.stops.astype(np.int64))
        batch.log_pf_BT[row, : t.completion.size] = torch.from_numpy(t.behaviour_log_prob.copy())
        batch.log_stop_BS[row, stops] = torch.from_numpy(t.behaviour_log_stop.copy()).double()
        batch.log_reward_BS[row, stops] = torch.from_numpy(t.log_reward / temperature).double()
        batch.stop_BS[row, stops] = True
    phi_BS = state_potentials(batch)
    for row, t in enumerate(trajectories):
        learners = phi_BS[row][batch.stop_BS[row]].numpy()
        np.testing.assert_allclose(potentials(t, temperature=temperature), learners, atol=1e-4)
    log_z_B = log_z_of(batch, phi_BS)
    ours = estimate_log_z(trajectories, temperature=temperature)
    assert ours == pytest.approx(float(log_z_B[0]), abs=1e-4)


def test_log_z_is_the_mean_over_the_group_at_the_tempered_reward() -> None:
    group = [toy_trajectory((1,), log_reward=-2.0), toy_trajectory((1, 2), log_reward=-6.0)]
    # log q: -0.5 a token and -0.25 for the stop
    expected = np.mean([-2.0 / 0.5 + 0.75, -6.0 / 0.5 + 1.25])
    assert estimate_log_z(group, temperature=0.5) == pytest.approx(expected)


def test_demonstrations_do_not_count_in_log_z() -> None:
    sampled = toy_trajectory((1, 2))
    shown = replace(toy_trajectory((3,), log_reward=9.0), behaviour="demonstration")
    alone = estimate_log_z([sampled], temperature=1.0)
    assert estimate_log_z([shown, sampled], temperature=1.0) == alone
    assert np.isnan(estimate_log_z([shown], temperature=1.0))
