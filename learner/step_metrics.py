"""The metrics of one optimizer step: loss, agreement, batch, cost, and bounds of log Z."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp

from buffer.replay import Group
from learner.agreement.comparison import Gap, Pair, log_q_differences, pair_of
from learner.batch import Batch, content, members
from learner.engine import Engine
from learner.objectives.base import ObjectiveInput, ObjectiveValue

Floats = NDArray[np.float64]


class Tally:
    """Adds up over micro-batches and ranks what only the forward passes know: loss and agreement.

    The agreement in the metrics is over what the version that is being updated has sampled itself:
    there the comparison comes free.
    """

    def __init__(self, groups: Sequence[Group], version: int) -> None:
        self._version = version
        self.loss = 0.0  # of this rank
        self.gaps: dict[Pair, Gap] = {}  # of who sampled the groups, once they are gathered
        sampled = (t for t in members(groups) if t.behaviour != "demonstration")
        pairs = sorted({pair_of(t) for t in sampled})  # on all ranks the same
        self._place = {pair: place for place, pair in enumerate(pairs)}
        self._row_sums: defaultdict[str, float] = defaultdict(float)
        self._rows = self._gap_sum = self._gap_count = self._gap_max = 0.0
        # Decisions, and sums of log q recomputed - recorded and of its square.
        self._moments: Floats = np.zeros((len(pairs), 3))

    def add(
        self, batch: Batch, inputs: ObjectiveInput, value: ObjectiveValue, *, factor: float
    ) -> None:
        """Count one micro-batch; `factor` is that of its total in the loss, 0 to skip it."""
        counted = float(factor > 0)
        self.loss += factor * value.total.item()
        self._rows += counted * len(batch.trajectories)
        for name, total in value.row_sums.items():
            self._row_sums[name] += counted * total.item()
        if counted and self._place:
            self._compare(batch, inputs)

    def gathered(self, engine: Engine) -> dict[str, float]:
        """Metrics over all ranks."""
        names = sorted(self._row_sums)
        sums = [self.loss, self._rows, self._gap_sum, self._gap_count]
        sums += [self._row_sums[name] for name in names]
        gap_max, *everyones = np.array(
            engine.gather([self._gap_max, *sums, *self._moments.ravel().tolist()])
        ).T
        loss, rows, gap_sum, gap_count, *rest = (float(values.sum()) for values in everyones)
        row_sums, moments_P3 = rest[: len(names)], np.reshape(rest[len(names) :], (-1, 3))
        self.gaps = {
            pair: Gap(int(count), math.sqrt(square / count), total / count)
            for pair, (count, total, square) in zip(self._place, moments_P3, strict=True)
        }
        metrics = {"loss/value": loss}
        metrics |= {f"loss/{n}": total / rows for n, total in zip(names, row_sums, strict=True)}
        if gap_count:
            metrics["agreement/max_nats"] = float(gap_max.max())
            metrics["agreement/mean_nats"] = gap_sum / gap_count
        return metrics

    def _compare(self, batch: Batch, inputs: ObjectiveInput) -> None:
        difference_BN, counted_BN = log_q_differences(batch, inputs.log_pf_BT, inputs.log_stop_BS)
        exact_BN = difference_BN.double()
        of_rows = [counted_BN.sum(1).double(), exact_BN.sum(1), exact_BN.square().sum(1)]
        moments_B3 = torch.stack(of_rows, dim=1).cpu().numpy()
        sampled = {r: t for r, t in enumerate(batch.trajectories) if t.behaviour != "demonstration"}
        places = [self._place[pair_of(t)] for t in sampled.values()]
        np.add.at(self._moments, places, moments_B3[[*sampled]])
        if own := [row for row, t in sampled.items() if t.policy_version == self._version]:
            gap_K = difference_BN[own][counted_BN[own]].abs()
            self._gap_sum += gap_K.sum().item()
            self._gap_count += gap_K.numel()
            self._gap_max = max(self._gap_max, gap_K.max().item())


def describe_groups(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Metrics of a drawn batch, known without the model; rewards and ages of what is fresh."""
    fresh = [trajectory for group in groups for trajectory in group.fresh]
    num_replayed = sum(len(group.replayed) for group in groups)
    metrics = {
        "batch/trajectories": float(len(fresh) + num_replayed),
        "batch/replayed": float(num_replayed),
    }
    if sampled := [t for t in fresh if t.behaviour != "demonstration"]:
        ages = [version - trajectory.policy_version for trajectory in sampled]
        metrics |= {
            "reward/log_mean_nats": _mean([float(t.log_reward[-1]) for t in sampled]),
            "policy/age_mean_versions": _mean(ages),
            "policy/age_max_versions": float(max(ages)),
        }
    on_policy = [trajectory for trajectory in fresh if trajectory.behaviour == "on_policy"]
    if verdicts := [t.correct for t in on_policy if t.correct is not None]:
        metrics["reward/correct_fraction"] = _mean(verdicts)
    return metrics


def describe_cost(groups: Sequence[Group], *, against_base: bool) -> dict[str, float]:
    """Tokens of one step's batch, padding left out:

        tokens/sampled  fresh trajectories: completions, and each group's prompt once
        tokens/scored   ... prompts, completions and an answer at every stop state, as the packed
                        pass has them; only where a language model scores
        tokens/learned  each distinct row once: one forward and one backward pass
        tokens/base     ... once more, forward, where the objective compares with the base LM

    A demonstration is neither sampled nor scored, and what is replayed was so before.
    """
    sampled = scored = 0
    for group in groups:
        fresh = [t for t in group.fresh if t.behaviour != "demonstration"]
        prompts = {t.prompt.tobytes(): t.prompt.size for t in fresh}
        sampled += sum(prompts.values()) + sum(t.completion.size for t in fresh)
        scored += sum(
            t.prompt.size + t.completion.size + t.stops.size * t.answer.size for t in fresh
        )
    distinct = {content(t): t.prompt.size + t.completion.size for t in members(groups)}
    learned = float(sum(distinct.values()))
    return {
        "tokens/sampled": float(sampled),
        "tokens/scored": float(scored),
        "tokens/learned": learned,
        "tokens/base": learned if against_base else 0.0,
    }


def describe_quality(groups: Sequence[Group], reward_temperature: float) -> dict[str, float]:
    """How far the policy is from the posterior, averaged over the prompts of a drawn batch.

    Only fresh trajectories that were sampled at temperature 1 count: they are samples of the policy
    that their log q belongs to. With log w = log R / T - log q and K of them of a prompt, in nats
    but for the last:

        posterior/elbo_nats      mean log w; on average log Z - KL(q || p)
        posterior/iwae_nats      log mean w; on average between that and log Z
        posterior/iwae_gap_nats  their difference; on average at most KL(q || p), so it shows that
                                 q is at least so far from p, and never that it is near
        posterior/ess_share      (sum w)² / (K sum w²), from 1/K to 1; of the samples there are, so
                                 it stays good where q misses a part of p

    One trajectory alone has no gap and no share: such groups count in the ELBO only. What no group
    can tell is left out. T is `reward_temperature`.
    """
    on_policy = [[t for t in group.fresh if t.behaviour == "on_policy"] for group in groups]
    of_groups = [np.array([t.log_weight(reward_temperature) for t in ts]) for ts in on_policy]
    metrics = {}
    if known := [row_K for row_K in of_groups if len(row_K)]:
        metrics["posterior/elbo_nats"] = _mean([row_K.mean() for row_K in known])
    if several := [row_K for row_K in known if len(row_K) > 1]:
        iwae = _mean([logsumexp(row_K) - np.log(len(row_K)) for row_K in several])
        elbo = _mean([row_K.mean() for row_K in several])
        metrics |= {
            "posterior/iwae_nats": iwae,
            "posterior/iwae_gap_nats": iwae - elbo,
            "posterior/ess_share": _mean([ess_share(row_K) for row_K in several]),
        }
    return metrics


def ess_share(log_weight_K: Floats) -> float:
    """(sum w)² / (K sum w²), from 1/K to 1."""
    weight_K = np.exp(log_weight_K - log_weight_K.max())
    return float(weight_K.mean() ** 2 / np.square(weight_K).mean())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
