"""The posterior p(Z | X, Y) ∝ R(Z ⊤)^(1/T) of one prompt by enumeration."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm.next_action import Prefix
from tasks.posterior.enumeration import PrefixTree, Support

# log R(Z ⊤) / T of completions, nats.
LogWeight = Callable[[Sequence[Prefix]], NDArray[np.float64]]
# Before anything is known of Z(X), rewards left out are compared to less and less.
_UNKNOWN_STEP_NATS = 5.0


@dataclass(frozen=True, eq=False, kw_only=True)
class ExactPosterior:
    """The posterior among the N completions that were enumerated."""

    support: Support
    log_weight_N: NDArray[np.float64]  # log R / T
    log_p_N: NDArray[np.float64]  # normalised over the N
    log_z: float  # log of their sum of R^(1/T): log Z(X), less what is left out
    left_out_p: float  # the share of the whole posterior that is left out, at most

    def within(self, tolerance: float, *, policy: int) -> bool:
        """Whether neither the posterior nor this policy leaves out more than `tolerance`."""
        return max(self.left_out_p, float(self.support.left_out_q_K[policy])) <= tolerance


def exact_posterior(tree: PrefixTree, log_weight: LogWeight, *, tolerance: float) -> ExactPosterior:
    """Enumerate until every policy and the posterior leave out at most `tolerance`, or the tree
    comes to its end before: ask `within`."""
    log_weights: list[NDArray[np.float64]] = []
    scored, log_z, log_scale = 0, -math.inf, 0.0
    while True:
        while not tree.exhausted and _wanting(tree, log_scale, tolerance):
            tree.expand(log_scale)
        fresh = tree.completions[scored:]
        scored += len(fresh)
        if fresh:
            log_weights.append(log_weight(fresh))
            log_z = float(np.logaddexp.reduce([log_z, *log_weights[-1]]))
        log_scale = log_z if math.isfinite(log_z) else log_scale - _UNKNOWN_STEP_NATS
        if tree.exhausted or not _wanting(tree, log_scale, tolerance):
            break
    log_weight_N = np.concatenate([np.zeros(0), *log_weights])
    return ExactPosterior(
        support=tree.support(),
        log_weight_N=log_weight_N,
        log_p_N=log_weight_N - log_z if math.isfinite(log_z) else log_weight_N,
        log_z=log_z,
        left_out_p=_share(tree.log_left_out_reward, log_z),
    )


def _wanting(tree: PrefixTree, log_scale: float, tolerance: float) -> bool:
    left_out_p = _share(tree.log_left_out_reward, log_scale)
    return left_out_p > tolerance or bool((tree.left_out_q_K > tolerance).any())


def _share(log_part: float, log_rest: float) -> float:
    """part / (part + rest); 1 where the part is unknown or the rest nothing."""
    if log_part == math.inf or log_rest == -math.inf:
        return 1.0
    return math.exp(log_part - float(np.logaddexp(log_part, log_rest)))
