"""Bounds of log Z from the trajectories of a step, as their samplers recorded them.

    log w = log R / T - log q,    log q = sum_t log q(z_t+1 | z_1:t) + log q(⊤ | z)

Only fresh trajectories that were sampled at temperature 1 count, since only they are samples of the
policy that their log q belongs to: that of the version that sampled them. No model is asked.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from buffer.replay import Group
from buffer.trajectory import Trajectory

Floats = NDArray[np.float64]


def describe_quality(groups: Sequence[Group], reward_temperature: float) -> dict[str, float]:
    """How far the policy is from the posterior, averaged over the prompts of a drawn batch.

    With K on-policy trajectories of a prompt, in nats but for the last:

        posterior/elbo_nats      mean log w; on average log Z - KL(q || p)
        posterior/iwae_nats      log mean w; on average between that and log Z
        posterior/iwae_gap_nats  their difference; on average at most KL(q || p), so it shows that
                                 q is at least so far from p, and never that it is near
        posterior/ess_share      (sum w)² / (K sum w²), from 1/K to 1; of the samples there are, so
                                 it stays good where q misses a part of p

    One trajectory alone has no gap and no share: such groups count in the ELBO only. What no group
    can tell is left out.

    Args:
        reward_temperature: T of the step.
    """
    log_weights = [
        np.array([log_weight(t, reward_temperature) for t in group.fresh if is_on_policy(t)])
        for group in groups
    ]
    known = [log_weight_K for log_weight_K in log_weights if len(log_weight_K)]
    if not known:
        return {}
    metrics = {"posterior/elbo_nats": _mean([log_weight_K.mean() for log_weight_K in known])}
    several = [log_weight_K for log_weight_K in known if len(log_weight_K) > 1]
    if several:
        iwae = [logsumexp(log_weight_K) - np.log(len(log_weight_K)) for log_weight_K in several]
        elbo = [log_weight_K.mean() for log_weight_K in several]
        metrics |= {
            "posterior/iwae_nats": _mean(iwae),
            "posterior/iwae_gap_nats": _mean(iwae) - _mean(elbo),
            "posterior/ess_share": _mean([ess_share(log_weight_K) for log_weight_K in several]),
        }
    return metrics


def is_on_policy(trajectory: Trajectory) -> bool:
    """Whether it is a sample of the policy itself, neither tempered nor somebody else's."""
    return trajectory.behaviour == "on_policy"


def log_weight(trajectory: Trajectory, reward_temperature: float) -> float:
    """log R / T - log q of one trajectory by its own record, nats."""
    return trajectory.terminal_log_reward / reward_temperature - trajectory.log_q


def ess_share(log_weight_K: Floats) -> float:
    """(sum w)² / (K sum w²), from 1/K to 1."""
    weight_K = np.exp(log_weight_K - log_weight_K.max())
    return float(weight_K.mean() ** 2 / np.square(weight_K).mean())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
