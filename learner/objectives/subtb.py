"""Modified sub-trajectory balance (Hu et al. 2024, eq. 3) in time and memory linear in length."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.objectives.base import Normalisation, ObjectiveInput, ObjectiveValue, Residuals
from learner.objectives.potential import count_states, log_z_of, state_potentials, with_root
from learner.objectives.traits import TRAITS


@dataclass(frozen=True)
class SubTB(Residuals):
    """Squared imbalance between all pairs of stop states of a trajectory.

        sum_{i<j} decay^(j-i-1) (phi_j - phi_i)^2,    i, j ranks among the stop states

    The root enters as `with_root` says.
    """

    decay: float = 1.0
    normalisation: Normalisation = "batch"

    traits: ClassVar = TRAITS["subtb"]

    def row_weights(self, stop_BS: Tensor) -> Tensor:
        return pair_weights(count_states(stop_BS), self.decay)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        phi_BS = state_potentials(batch)
        log_z_B = log_z_of(batch, phi_BS)
        phi_BN, real_BN = with_root(phi_BS, batch.stop_BS, log_z_B)
        loss_B = pair_sums(phi_BN, real_BN, self.decay)
        return self.value(loss_B, batch.stop_BS, log_z_B)


def pair_weights(count_B: Tensor, decay: float) -> Tensor:
    """sum_{i<j<n} decay^(j-i-1) for each number of states n: [B] float64, 0 where n < 2."""
    most = max(int(count_B.max()), 2)
    power_N = decay ** torch.arange(most - 1, dtype=torch.float64, device=count_B.device)
    weight_N = power_N.cumsum(0).cumsum(0)  # entry n-2: the last state's pairs, plus all before
    return torch.where(count_B >= 2, weight_N[(count_B - 2).clamp(min=0)], 0.0)


def pair_sums(phi_BN: Tensor, real_BN: Tensor, decay: float) -> Tensor:
    """sum_{i<j} decay^(j-i-1) (phi_j - phi_i)^2 over the real states of each row: [B].

    Real states must come first in their row. Time and memory are linear in N.
    """
    count_B1 = real_BN.sum(1, keepdim=True)
    phi_BN = torch.where(real_BN, phi_BN, 0.0)
    # The sum does not change under a common shift; centring keeps |phi| ~ 100 from cancelling.
    mean_B1 = phi_BN.detach().sum(1, keepdim=True) / count_B1.clamp(min=1)
    phi_BN = torch.where(real_BN, phi_BN - mean_B1, 0.0)
    if decay == 1.0:
        return count_B1.squeeze(1) * phi_BN.square().sum(1) - phi_BN.sum(1).square()
    return _DecayedPairSums.apply(phi_BN, real_BN, decay)


class _DecayedPairSums(torch.autograd.Function):
    """The pair sum for decay != 1, with its gradient in closed form.

    With respect to phi_m it is twice the decayed sum of phi_m - phi_i over the other states i on
    both sides, so one scan from each end gives it and the scans themselves need not be stored.
    """

    @staticmethod
    def forward(ctx: Any, phi_BN: Tensor, real_BN: Tensor, decay: float) -> Tensor:
        first_BN, second_BN = _scan_differences(phi_BN, real_BN, decay)
        after_BN, _ = _scan_differences(phi_BN.flip(1), real_BN.flip(1), decay)
        ctx.save_for_backward(2 * torch.where(real_BN, first_BN + after_BN.flip(1), 0.0))
        return torch.where(real_BN, second_BN, 0.0).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope_BN,) = ctx.saved_tensors
        return grads[0][:, None] * slope_BN, None, None


def _scan_differences(phi_BN: Tensor, real_BN: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """For every j: sum_{i<j} decay^(j-i-1) (phi_j - phi_i)^p, p = 1 and 2, over real i.

    Windows ending at j double in width (Hillis and Steele 1986). Each holds the zeroth to second
    moment of phi_j - phi_i; joining the window before moves that one's origin from phi_{j-width}
    to phi_j. Differences of neighbours only: nothing large is subtracted from anything large.
    """
    states = phi_BN.shape[1]
    mass_BN = real_BN.to(phi_BN)  # includes i = j, whose moments are 0; divided out at the end
    first_BN = torch.zeros_like(phi_BN)
    second_BN = torch.zeros_like(phi_BN)
    width = 1
    while width < states:
        factor = decay**width
        shift_BN = phi_BN[:, width:] - phi_BN[:, :-width]
        mass, first, second = mass_BN[:, :-width], first_BN[:, :-width], second_BN[:, :-width]
        moved_second = second + shift_BN * (2 * first + shift_BN * mass)
        moved_first = first + shift_BN * mass
        second_BN = _add_from(second_BN, factor * moved_second, width)
        first_BN = _add_from(first_BN, factor * moved_first, width)
        mass_BN = _add_from(mass_BN, factor * mass, width)
        width *= 2
    return first_BN / decay, second_BN / decay


def _add_from(values_BN: Tensor, addend: Tensor, start: int) -> Tensor:
    """values with `addend` added to its columns from `start` on."""
    return torch.cat([values_BN[:, :start], values_BN[:, start:] + addend], dim=1)
