"""Trajectory balance (Malkin et al. 2022, eq. 14), log Z from the group or learned.

From the group it is VarGrad (Richter et al. 2020; Zhang et al. 2023). The longest span of SubTB
alone: the limit of its lambda -> infinity.
"""

from dataclasses import dataclass
from typing import ClassVar

from learner.objectives.base import ObjectiveInput, ObjectiveValue, PerTrajectory
from learner.objectives.potential import at_end, log_z_of, state_potentials
from learner.objectives.traits import TRAITS


@dataclass(frozen=True)
class TrajectoryBalance(PerTrajectory):
    """Squared imbalance of whole trajectories, root to terminal state.

        (log Z(X) + log q(Z ⊤ | X) - log R(Z ⊤) / T)^2

    Estimated from the group, log Z(X) is the mean over the trajectories of the prompt, detached,
    so that the gradient is that of their variance, and a prompt with a single trajectory teaches
    nothing. Stop states on the way do not enter: their rewards neither help nor disturb.
    """

    traits: ClassVar = TRAITS["tb"]

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        phi_BS = state_potentials(batch)
        log_z_B = log_z_of(batch, phi_BS)
        residual_B = log_z_B + at_end(phi_BS, batch.stop_BS)
        return ObjectiveValue(residual_B.square().sum(), {"log_z_nats": log_z_B.detach().sum()})
