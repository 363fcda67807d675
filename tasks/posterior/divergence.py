"""How far a policy is from a posterior of which N completions were enumerated.

p adds up to 1 over these, at most `left_out_p` in total variation from the whole posterior; q
adds up to 1 - `left_out_q`. `tv` is an upper bound, with `left_out_p` added; `kl_p_q` and `jsd` are
those of this p and of the whole q; `kl_q_p`, which would be infinite where q leaves the N, is that
of q given that it stays among them. With nothing left out all four are exact.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Between a policy q and the posterior p; tv in [0, 1], the others in nats."""

    tv: float
    kl_q_p: float
    kl_p_q: float
    jsd: float


def divergence(
    log_q_N: Floats, log_p_N: Floats, *, left_out_q: float = 0.0, left_out_p: float = 0.0
) -> Divergence:
    """All four; log_p_N is -inf where the reward is zero."""
    inside_q = float(np.logaddexp.reduce(log_q_N))
    return Divergence(
        tv=total_variation(log_q_N, log_p_N, left_out_q=left_out_q, left_out_p=left_out_p),
        kl_q_p=kl(log_q_N - inside_q, log_p_N),
        kl_p_q=kl(log_p_N, log_q_N),
        jsd=jensen_shannon(log_q_N, log_p_N, left_out_q=left_out_q),
    )


def total_variation(
    log_q_N: Floats, log_p_N: Floats, *, left_out_q: float = 0.0, left_out_p: float = 0.0
) -> float:
    """Largest difference in the probability of any set of completions, at most 1."""
    apart = float(np.abs(np.exp(log_q_N) - np.exp(log_p_N)).sum()) + left_out_q
    return min(apart / 2 + left_out_p, 1.0)


def coverage(log_q_N: Floats, log_p_N: Floats, *, at_least: float = 0.1) -> float:
    """Posterior mass of the completions with q >= `at_least` * p, in [0, 1]: 1 where no mode is
    missed. Too much mass elsewhere does not show in it."""
    covered_N = log_q_N >= log_p_N + math.log(at_least)
    return float(np.exp(log_p_N[covered_N]).sum())


def kl(log_a_N: Floats, log_b_N: Floats) -> float:
    """KL(a || b) = sum a log(a / b), nats; inf where b lacks what a has."""
    has = log_a_N > -np.inf
    if (log_b_N[has] == -np.inf).any():
        return math.inf
    return float(np.sum(np.exp(log_a_N[has]) * (log_a_N[has] - log_b_N[has])))


def jensen_shannon(log_q_N: Floats, log_p_N: Floats, *, left_out_q: float = 0.0) -> float:
    """Mean KL of q and of p to their mixture, nats, between 0 and log 2."""
    log_mixture_N = np.logaddexp(log_q_N, log_p_N) - math.log(2)
    outside = left_out_q * math.log(2)  # of it, the mixture has half
    return (kl(log_q_N, log_mixture_N) + outside + kl(log_p_N, log_mixture_N)) / 2
