"""How far q is from a posterior that nobody can enumerate: bounds of log Z, and of KL.

    w(Z) = R(Z)^(1/T) / q(Z | X),    Z(X) = E_q[w],    p(Z) = R(Z)^(1/T) / Z(X)

    ELBO   = E_q[log w]                       = log Z - KL(q || p)
    IWAE_K = E_q[log (w_1 + ... + w_K) / K]   between ELBO and log Z, rising with K
    EUBO   = E_p[log w]                       = log Z + KL(p || q)

Sources: IWAE, Burda et al. 2016 (arXiv 1509.00519, theorem 1); EUBO, Blessing et al. 2024 (arXiv
2406.07423), who also show why figures that see samples of q alone must not be trusted alone: a mode
that q never visits is in none of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, stdtrit

Floats = NDArray[np.float64]

# A spread that is estimated from fewer values says nothing.
FEWEST = 10
RESAMPLES = 1000
_BLOCK = 1 << 18  # samples that are resampled at a time
_TAIL = 0.025


class UnusableWeights(ValueError):
    """Log weights from which nothing can be estimated: too few of them, or not finite."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What samples say of log Z and of the distance between q and the posterior p, nats.

    Where q misses a part of p, the first block cannot tell: `elbo`, `iwae` and `log_z` are merely
    too low, and `ess_share` too good. Only figures of posterior samples see what q does not.
    """

    samples: int  # of q
    elbo: Interval
    iwae: dict[int, Interval]  # by K
    log_z: Interval  # log of the mean weight: too low on average, by less than any IWAE
    ess_share: Interval  # effective share of the samples, in the limit 1 / (1 + chi²(p || q))
    kl_q_p_at_least: Interval  # IWAE of the largest K - ELBO

    posterior_samples: int
    eubo: Interval | None = None  # None here and below: too few posterior samples
    kl_q_p_at_most: Interval | None = None  # EUBO - ELBO
    kl_p_q_at_most: Interval | None = None  # EUBO - IWAE of the largest K
    posterior_ess_share: Interval | None = None  # the same limit, from E_q[w] / E_p[w]


def bound_log_z(
    log_weight_N: NDArray[np.floating],
    *,
    sizes: Sequence[int],
    log_posterior_weight_M: NDArray[np.floating] | None = None,
    posterior_draw_M: NDArray[np.integer] | None = None,
    rng: np.random.Generator,
) -> Bounds:
    """Estimate every bound, each with a 95 % interval.

    Means have Student's interval; ESS and log of the mean weight, which are no means, the bootstrap
    percentile interval (Efron and Tibshirani 1993, chapter 13).

    Args:
        log_weight_N: log R / T - log q, nats, of independent samples of q, in the order drawn.
        sizes: K of the IWAE bounds. One of which N holds fewer than FEWEST blocks is left out.
        log_posterior_weight_M: the same of exact samples of the posterior at the same T.
        posterior_draw_M: equal numbers mark samples that depend on each other; None: none does.

    Raises UnusableWeights (fewer than FEWEST samples of q, or a log weight that is not finite) and
    ValueError (a size below 1).
    """
    if any(k < 1 for k in sizes):
        raise ValueError(f"sizes of IWAE bounds must be 1 or more, not {list(sizes)}")
    log_q_N = _checked(log_weight_N, "log_weight_N")
    if len(log_q_N) < FEWEST:
        raise UnusableWeights(f"{len(log_q_N)} samples of q, fewer than {FEWEST}: draw more")
    blocks = {
        k: log_q_N[: len(log_q_N) // k * k].reshape(-1, k)  # [C, K], as many as are whole
        for k in sorted({1, *sizes})
        if len(log_q_N) >= FEWEST * k
    }
    log_mean = {k: logsumexp(block_CK, axis=1) - math.log(k) for k, block_CK in blocks.items()}
    iwae = {k: _Mean.of(log_mean_C) for k, log_mean_C in log_mean.items()}
    widest = max(blocks)
    moments = _Moments.resampled(log_q_N, None, rng)
    given_M = np.empty(0) if log_posterior_weight_M is None else log_posterior_weight_M
    log_p_M = _checked(given_M, "log_posterior_weight_M")
    return Bounds(
        samples=len(log_q_N),
        elbo=iwae[1].interval,
        iwae={k: mean.interval for k, mean in iwae.items() if k in sizes},
        log_z=moments.interval(moments.log_first_R),
        ess_share=moments.interval(np.exp(2 * moments.log_first_R - moments.log_second_R)),
        kl_q_p_at_least=_Mean.of(log_mean[widest] - blocks[widest].mean(axis=1)).interval,
        posterior_samples=len(log_p_M),
        **_posterior_bounds(log_p_M, posterior_draw_M, iwae, moments, rng),
    )


@dataclass(frozen=True, slots=True)
class _Mean:
    """A mean of values of which `independent` do not depend on one another."""

    value: float
    error: float  # standard error
    independent: int

    @staticmethod
    def of(value_M: Floats, draw_M: NDArray[np.integer] | None = None) -> "_Mean":
        """Of values that hang together by draw: a ratio, whose error is the linearised one (Cochran
        1977, section 6.4), and the ordinary one for draws of one value each."""
        mean = float(value_M.mean())
        residual_D = np.bincount(_numbered(len(value_M), draw_M), weights=value_M - mean)
        draws = len(residual_D)
        scale = draws / max(1, draws - 1)
        error = math.sqrt(scale * float(np.square(residual_D).sum())) / len(value_M)
        return _Mean(mean, error, draws)

    def less(self, other: "_Mean") -> "_Mean":
        """The difference of two means from different samples."""
        error = math.hypot(self.error, other.error)
        return _Mean(self.value - other.value, error, min(self.independent, other.independent))

    @property
    def interval(self) -> Interval:
        half = float(stdtrit(self.independent - 1, 1 - _TAIL)) * self.error
        return Interval(self.value, self.value - half, self.value + half)


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Logs of the mean weight and of the mean squared weight: entry 0 of the sample itself,
    the others of resamples."""

    log_first_R: Floats
    log_second_R: Floats

    @staticmethod
    def resampled(
        log_weight_M: Floats, draw_M: NDArray[np.integer] | None, rng: np.random.Generator
    ) -> "_Moments":
        """Resample whole draws, which are single weights where `draw_M` is None."""
        from scipy import stats  # late: takes half a second, and only who evaluates needs it

        top = float(log_weight_M.max())
        weight_M = np.exp(log_weight_M - top)
        draw_M = _numbered(len(weight_M), draw_M)
        sums_3D = np.stack([np.bincount(draw_M, weights=weight_M**power) for power in range(3)])

        def log_means(*sums: Floats, axis: int) -> Floats:
            size, first, second = (sum_D.sum(axis) for sum_D in sums)
            return np.stack([np.log(first / size) + top, np.log(second / size) + 2 * top])

        resampled = stats.bootstrap(
            tuple(sums_3D),
            log_means,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, _BLOCK // sums_3D.shape[1]),
            method="percentile",
            rng=rng,
        ).bootstrap_distribution
        return _Moments(*np.column_stack([log_means(*sums_3D, axis=0), resampled]))

    @staticmethod
    def interval(statistic_R: Floats) -> Interval:
        """The percentile interval of a statistic that was computed for every entry."""
        low, high = np.quantile(statistic_R[1:], [_TAIL, 1 - _TAIL])
        return Interval(float(statistic_R[0]), float(low), float(high))


def _posterior_bounds(
    log_p_M: Floats,
    draw_M: NDArray[np.integer] | None,
    iwae: dict[int, _Mean],
    moments: _Moments,
    rng: np.random.Generator,
) -> dict[str, Interval]:
    """The fields of Bounds that need posterior samples, where there are enough."""
    if not len(log_p_M) or (eubo := _Mean.of(log_p_M, draw_M)).independent < FEWEST:
        return {}
    under_p = _Moments.resampled(log_p_M, draw_M, rng)
    # E_p[w] / Z = 1 + chi²(p || q) >= 1, so what lies above 1 is noise.
    share_R = np.exp(np.minimum(moments.log_first_R - under_p.log_first_R, 0.0))
    return {
        "eubo": eubo.interval,
        "kl_q_p_at_most": eubo.less(iwae[1]).interval,
        "kl_p_q_at_most": eubo.less(iwae[max(iwae)]).interval,
        "posterior_ess_share": moments.interval(share_R),
    }


def _numbered(size: int, draw_M: NDArray[np.integer] | None) -> NDArray[np.intp]:
    """Every sample's draw, counted from 0 without gaps; each its own where none is given."""
    return np.arange(size) if draw_M is None else np.unique(draw_M, return_inverse=True)[1]


def _checked(log_weight_M: NDArray[np.floating], name: str) -> Floats:
    if broken := int((~np.isfinite(log_weight_M)).sum()):
        raise UnusableWeights(
            f"{broken} of {len(log_weight_M)} entries of {name} are not finite: a completion of "
            "reward 0, or one that the policy cannot produce, has no place among them"
        )
    return np.asarray(log_weight_M, dtype=np.float64)
