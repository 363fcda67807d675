"""Supervised fine-tuning: maximum likelihood of the completions it is shown."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.base import ObjectiveInput, ObjectiveValue
from learner.objectives.potential import terminal_log_probs


@dataclass(frozen=True)
class MaximumLikelihood:
    """Negative log-likelihood of whole completions, a mean over trajectories, nats.

        - log q(Z ⊤ | X) = - sum_k log q(z_{k+1} | z_1:k) - log q(⊤ | Z)

    Tool tokens have probability 1 and teach nothing; rewards do not enter. Over a fixed set of
    completions the optimum is their empirical distribution (the KL from it to q is least), so what
    the policy becomes is what it is shown: `learner.demonstrations`.
    """

    def weight(self, stop_BS: Tensor) -> Tensor:
        """The number of rows."""
        return torch.tensor(stop_BS.shape[0], dtype=torch.float64, device=stop_BS.device)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        log_q_B = terminal_log_probs(batch.log_pf_BT, batch.log_stop_BS, batch.stop_BS)
        return ObjectiveValue(total=-log_q_B.sum(), row_sums={"log_q_nats": log_q_B.detach().sum()})
