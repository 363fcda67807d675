"""Every objective beside its brute force. A new one gets all shared tests by a line in FAMILY."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.base import Normalisation, Objective, ObjectiveInput
from learner.objectives.db import DetailedBalance
from learner.objectives.raptb import RootedPrefixBalance
from learner.objectives.subtb import SubTB
from learner.objectives.tb import TrajectoryBalance


@dataclass(frozen=True)
class Row:
    """One trajectory without padding, of 0-dimensional tensors."""

    log_pf: list[Tensor]  # of each token
    log_stop: dict[int, Tensor]  # by stop state; the last is the terminal one
    log_reward: dict[int, Tensor]
    log_z: Tensor

    @property
    def length(self) -> int:
        return max(self.log_stop)

    def path(self, start: int, end: int) -> Tensor:
        """log q of the tokens from state `start` to state `end`."""
        return sum(self.log_pf[start:end], start=torch.zeros((), dtype=torch.float64))

    def phi(self, t: int) -> Tensor:
        return self.path(0, t) + self.log_stop[t] - self.log_reward[t]


# Residuals of a trajectory, each with its weight.
Terms = Callable[[Row], list[tuple[Tensor, float]]]


def between_states(weigh: Callable[[int], float]) -> Terms:
    """All pairs of states, `weigh`ed by their distance; the root where t = 0 is no stop state."""

    def terms(row: Row) -> list[tuple[Tensor, float]]:
        phis = [row.phi(t) for t in sorted(row.log_stop)]
        if 0 not in row.log_stop:
            phis = [-row.log_z, *phis]
        pairs = itertools.combinations(range(len(phis)), 2)
        return [(phis[j] - phis[i], weigh(j - i)) for i, j in pairs if weigh(j - i) > 0]

    return terms


def whole_trajectory(row: Row) -> list[tuple[Tensor, float]]:
    return [(row.log_z + row.phi(row.length), 1.0)]


def rooted_prefixes(row: Row) -> list[tuple[Tensor, float]]:
    end = row.length
    terms = whole_trajectory(row)
    for t in row.log_stop:
        if 0 < t < end:
            suffix = row.path(t, end) + row.log_stop[end]
            target = (row.log_reward[end] - suffix).detach()
            terms.append((row.log_z + row.path(0, t) - target, 1.0))
    return terms


@dataclass(frozen=True)
class Member:
    objective: Objective
    terms: Terms
    normalisation: Normalisation = "batch"

    def __str__(self) -> str:
        return str(self.objective)

    def brute_force(self, batch: ObjectiveInput) -> Tensor:
        """The normalised loss by loops over rows and terms."""
        rows = [self.terms(row) for row in rows_of(batch)]
        losses = [sum(weight * gap**2 for gap, weight in terms) for terms in rows if terms]
        weights = [sum(weight for _, weight in terms) for terms in rows if terms]
        if self.normalisation == "trajectory":
            ratios = [loss / weight for loss, weight in zip(losses, weights, strict=True)]
            return torch.as_tensor(sum(ratios) / len(ratios))
        return torch.as_tensor(sum(losses) / sum(weights))


def rows_of(batch: ObjectiveInput) -> Iterator[Row]:
    """The batch row by row; without a learned log Z, with the group's mean."""
    stops = [[t for t in range(len(row)) if row[t]] for row in batch.stop_BS.tolist()]

    def row_of(b: int, log_z: Tensor) -> Row:
        return Row(
            log_pf=list(batch.log_pf_BT[b]),
            log_stop={t: batch.log_stop_BS[b, t] for t in stops[b]},
            log_reward={t: batch.log_reward_BS[b, t] for t in stops[b]},
            log_z=log_z,
        )

    zero = torch.zeros((), dtype=torch.float64)
    for b in range(len(stops)):
        if batch.log_z_B is not None:
            yield row_of(b, batch.log_z_B[b])
            continue
        mates = [m for m in range(len(stops)) if batch.group_B[m] == batch.group_B[b]]
        log_ratios = [row_of(m, zero).phi(max(stops[m])).item() for m in mates]
        yield row_of(b, torch.tensor(-sum(log_ratios) / len(mates), dtype=torch.float64))


def both(make: Callable[[Normalisation], Objective], terms: Terms) -> list[Member]:
    return [Member(make("batch"), terms), Member(make("trajectory"), terms, "trajectory")]


FAMILY = (
    *both(lambda by: SubTB(1.0, by), between_states(lambda distance: 1.0)),
    *both(lambda by: SubTB(0.9, by), between_states(lambda distance: 0.9 ** (distance - 1))),
    *both(DetailedBalance, between_states(lambda distance: float(distance == 1))),
    *both(RootedPrefixBalance, rooted_prefixes),
    Member(TrajectoryBalance(), whole_trajectory),
)


def ragged_batch(*, root_stops: str, log_z: str = "group", seed: int = 0) -> ObjectiveInput:
    """Rows of very different length with holes between the stop states, as tools leave them.

    log q, and a learned log Z of each prompt, are leaves of the graph.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = (0, 1, 2, 5, 9, 14) if root_stops != "never" else (1, 2, 3, 5, 9, 14)
    tokens = max(lengths)
    stop_BS = torch.rand(len(lengths), tokens + 1, generator=generator) < 0.7
    for row, length in enumerate(lengths):
        stop_BS[row, length] = True
        stop_BS[row, length + 1 :] = False
        if root_stops == "always" or (root_stops == "mixed" and row % 2 == 0):
            stop_BS[row, 0] = True
        elif length > 0:
            stop_BS[row, 0] = False
    log_pf_BT = -3 * torch.rand(len(lengths), tokens, generator=generator).double()
    log_stop_BS = -5 * torch.rand(len(lengths), tokens + 1, generator=generator).double()
    log_reward_BS = 9 * torch.randn(len(lengths), tokens + 1, generator=generator).double() - 90
    log_z_B = 9 * torch.randn(len(lengths), generator=generator).double() - 80
    return ObjectiveInput(
        log_pf_BT=log_pf_BT.requires_grad_(),
        log_stop_BS=log_stop_BS.requires_grad_(),
        log_reward_BS=log_reward_BS,
        stop_BS=stop_BS,
        group_B=torch.tensor([0, 0, 0, 1, 1, 2]),
        log_z_B=log_z_B.requires_grad_() if log_z == "learned" else None,
    )


def leaves_of(batch: ObjectiveInput) -> list[Tensor]:
    learned = [] if batch.log_z_B is None else [batch.log_z_B]
    return [batch.log_pf_BT, batch.log_stop_BS, *learned]


def gradients(loss: Tensor, batch: ObjectiveInput) -> list[Tensor]:
    """With respect to the leaves; zeros where the loss does not reach."""
    return list(torch.autograd.grad(loss, leaves_of(batch), materialize_grads=True))
