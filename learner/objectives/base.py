"""What every training objective takes and gives. An objective is one file beside this one."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from learner.objectives.traits import Traits

# What squared residuals are divided by: their weights in the whole batch, so that a trajectory with
# more of them counts for more (the reference code), or first those of their own trajectory, so that
# every trajectory counts alike (a mean over samples, as the papers write).
Normalisation = Literal["batch", "trajectory"]


@dataclass(frozen=True, eq=False)
class ObjectiveInput:
    """Trajectories under the current policy. B rows, T tokens, S = T + 1 states; all in nats.

    All rows of a group stand in one input: quantities of a prompt are estimated from them.
    """

    log_pf_BT: Tensor  # log q of token t+1 after t tokens, 0 at tool tokens, any value as padding
    log_stop_BS: Tensor  # log q(stop) after t tokens, any value where stop_BS is False
    log_reward_BS: Tensor  # tempered log R of stopping after t tokens, likewise
    stop_BS: Tensor  # bool: the policy may stop here; the last one of a row is terminal
    group_B: Tensor  # int64 below B: rows with the same number share their prompt
    log_z_B: Tensor | None = None  # learned log Z of each row's prompt; None: from the group
    # As log_pf_BT and log_stop_BS, without gradient: recorded by the sampler at its own version,
    # and under the base LM. For reward maximisation alone; None: nobody asked.
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
    def traits(self) -> Traits: ...

    def weight(self, stop_BS: Tensor) -> Tensor:
        """Normaliser of these rows, scalar float64.

        From shapes alone, so that it is known before the first backward pass and gradients may be
        accumulated exactly.
        """

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue: ...


class PerTrajectory:
    """An objective with a single term for each trajectory: its loss is a mean over them."""

    def weight(self, stop_BS: Tensor) -> Tensor:
        return torch.tensor(stop_BS.shape[0], dtype=torch.float64, device=stop_BS.device)


class Residuals:
    """An objective with several squared residuals for each trajectory, and log Z in some."""

    normalisation: Normalisation

    def row_weights(self, stop_BS: Tensor) -> Tensor:
        """Weights of the residuals of each row, summed: [B]."""
        raise NotImplementedError

    def weight(self, stop_BS: Tensor) -> Tensor:
        """The weights of all residuals, or the number of rows that have any."""
        weight_B = self.row_weights(stop_BS)
        if self.normalisation == "trajectory":
            weight_B = weight_B > 0
        return weight_B.double().sum()

    def value(self, loss_B: Tensor, stop_BS: Tensor, log_z_B: Tensor) -> ObjectiveValue:
        """Of the weighted squares of each row, summed."""
        if self.normalisation == "trajectory":
            weight_B = self.row_weights(stop_BS).to(loss_B)
            loss_B = (loss_B / weight_B.clamp(min=1e-30)).where(weight_B > 0, 0.0)
        return ObjectiveValue(loss_B.sum(), {"log_z_nats": log_z_B.detach().sum()})
