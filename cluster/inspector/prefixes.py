"""What a trajectory's record says of each of its stop states: flows and their imbalance.

All from the behaviour's own record: log q as the actor's version gave it, log R as the reward
replica gave it. The learner computes log q afresh under its current weights, so its loss is
another number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Prefix:
    """One stop state, the prefix of `length` tokens; all in nats."""

    length: int
    log_reward: float  # untempered
    log_path: float  # log q of getting here: its tokens, without a stop
    log_q_stop: float
    potential: float
    residual: float | None  # potential less that of the stop state before; None for the first


def prefixes_of(trajectory: Trajectory, *, temperature: float, log_z: float) -> tuple[Prefix, ...]:
    """Every stop state, shortest first.

    The potential is phi_t = log q(z_1:t) + log q(stop | z_1:t) - log R(z_1:t stop) / T. SubTB
    (Hu et al. 2024, eq. 3) is the squared differences of these over all pairs; the residual is
    that of neighbours. Where the bare prompt is no stop state, the root stands before the first
    one, with its flow Z as its potential: phi = -log Z.

    Args:
        temperature: T.
        log_z: of the prompt, nats, as `estimate_log_z` says.
    """
    potential_S = potentials(trajectory, temperature=temperature)
    has_root = trajectory.stops[0] > 0
    before_S = np.concatenate([[-log_z if has_root else np.nan], potential_S[:-1]])
    residual_S = potential_S - before_S
    path_S = path_log_probs(trajectory)
    return tuple(
        Prefix(
            length=int(trajectory.stops[s]),
            log_reward=float(trajectory.log_reward[s]),
            log_path=float(path_S[s]),
            log_q_stop=float(trajectory.log_q_stop[s]),
            potential=float(potential_S[s]),
            residual=None if np.isnan(residual_S[s]) else float(residual_S[s]),
        )
        for s in range(len(trajectory.stops))
    )


def path_log_probs(trajectory: Trajectory) -> NDArray[np.float64]:
    """log q of the tokens up to each stop state, [S] nats; a tool's tokens have probability 1."""
    steps_L = np.cumsum(trajectory.log_q_token, dtype=np.float64)
    return np.concatenate([[0.0], steps_L])[trajectory.stops]


def potentials(trajectory: Trajectory, *, temperature: float) -> NDArray[np.float64]:
    """phi of each stop state, [S] nats; at the optimum all of a prompt equal -log Z."""
    log_q_S = path_log_probs(trajectory) + trajectory.log_q_stop
    return log_q_S - trajectory.log_reward.astype(np.float64) / temperature


def estimate_log_z(trajectories: Sequence[Trajectory], *, temperature: float) -> float:
    """log Z of a prompt from some of its trajectories, nats: the mean of log R / T - log q.

    VarGrad's estimate (Richter et al. 2020), here from recorded log q of several versions.
    """
    return -float(np.mean([potentials(t, temperature=temperature)[-1] for t in trajectories]))
