"""Detailed balance (Bengio et al. 2023, "GFlowNet foundations"), modified for stop states.

The form without a learned flow is that of Deleu et al. (2022). The shortest spans of SubTB alone,
the limit of its lambda -> 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from learner.objectives.base import Normalisation, ObjectiveInput, ObjectiveValue, Residuals
from learner.objectives.potential import count_states, log_z_of, state_potentials, with_root
from learner.objectives.traits import TRAITS


@dataclass(frozen=True)
class DetailedBalance(Residuals):
    """Squared imbalance between neighbouring stop states s, s' of a trajectory.

        (log F(s) + sum of log q(z | ..) from s to s' - log F(s'))^2,   F(s) = R(s ⊤) / q(⊤ | s)

    which is (phi_j+1 - phi_j)^2 of their potentials. Tokens between two stop states, where the
    policy may not stop, make one step together. The root enters as `with_root` says.
    """

    normalisation: Normalisation = "batch"

    traits: ClassVar = TRAITS["db"]

    def row_weights(self, stop_BS: Tensor) -> Tensor:
        return count_states(stop_BS) - 1

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        phi_BS = state_potentials(batch)
        log_z_B = log_z_of(batch, phi_BS)
        phi_BN, real_BN = with_root(phi_BS, batch.stop_BS, log_z_B)
        # Real states come first, so a real one that is not the first follows a real one.
        residual_BN = torch.where(real_BN[:, 1:], phi_BN[:, 1:] - phi_BN[:, :-1], 0.0)
        return self.value(residual_BN.square().sum(1), batch.stop_BS, log_z_B)
