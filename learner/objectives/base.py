"""What every training objective takes and gives. An objective is one file beside this one."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from learner.objectives.traits import Traits

# What the squared residuals of an objective are divided by: their weights in the whole batch, so
# that a trajectory with more of them counts for more (the reference code), or first those of their
# own trajectory, so that every trajectory counts alike (a mean over samples, as the papers write).
Normalisation = Literal["batch", "trajectory"]


@dataclass(frozen=True, eq=False)
class ObjectiveInput:
    """Trajectories under the current policy. B rows, T tokens, S = T + 1 states; all in nats.

    Rows of one group stand together in one input, so that quantities of a prompt can be
    estimated from it.
    """

    log_pf_BT: Tensor  # log q of token t+1 after t tokens, 0 at tool tokens, any value as padding
    log_stop_BS: Tensor  # log q(stop) after t tokens, any value where stop_BS is False
    log_reward_BS: Tensor  # tempered log R of stopping after t tokens, likewise
    stop_BS: Tensor  # bool: the policy may stop here; the last one of a row is terminal
    group_B: Tensor  # int64 below B: rows with the same number share their prompt
    log_z_B: Tensor | None = None  # learned log Z of each row's prompt; None: from the group
    # The same as log_pf_BT and log_stop_BS, without gradient: as the sampler recorded them at its
    # own version, and under the base LM. For reward maximisation alone; None: nobody asked.
    behaviour_log_prob_BT: Tensor | None = None
    behaviour_log_stop_BS: Tensor | None = None
    base_log_pf_BT: Tensor | None = None
    base_log_stop_BS: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ObjectiveValue:
    """An unnormalised loss, so that micro-batches and ranks add up to the loss of the batch."""

    total: Tensor  # scalar, differentiable
    row_sums: dict[str, Tensor]  # metric -> scalar sum over the rows, detached


class Objective(Protocol):
    """A pure function of a batch; its loss is the sum of `total` over the sum of `weight`."""

    @property
    def traits(self) -> Traits:
        """What it needs and means."""
        ...

    def weight(self, stop_BS: Tensor) -> Tensor:
        """Normaliser of these rows, scalar float64.

        It depends on the shape of the trajectories alone, so it is known before the first
        backward pass and gradients may be accumulated exactly.
        """
        ...

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        """Sum of the loss over these rows."""
        ...


class PerTrajectory:
    """An objective with a single term for each trajectory: its loss is a mean over them."""

    def weight(self, stop_BS: Tensor) -> Tensor:
        """The number of rows."""
        return torch.tensor(stop_BS.shape[0], dtype=torch.float64, device=stop_BS.device)


def sum_weights(weight_B: Tensor, normalisation: Normalisation) -> Tensor:
    """The normaliser of rows with these weights, scalar float64."""
    if normalisation == "batch":
        return weight_B.double().sum()
    return (weight_B > 0).sum().double()


def sum_losses(loss_B: Tensor, weight_B: Tensor, normalisation: Normalisation) -> Tensor:
    """What `sum_weights` is to divide: the rows' losses, each over its own weight if so asked."""
    if normalisation == "trajectory":
        weight_B = weight_B.to(loss_B)
        loss_B = (loss_B / weight_B.clamp(min=1e-30)).where(weight_B > 0, 0.0)
    return loss_B.sum()
