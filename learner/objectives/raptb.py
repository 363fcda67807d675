"""Root-anchored prefixes with targets absorbed from the suffix, after RapTB (Wang et al. 2026).

"Rooted absorbed prefix trajectory balance with submodular replay for GFlowNet training", arXiv
2603.00454: each prefix of a trajectory gets one constraint from the root, O(N) in place of SubTB's
O(N^2) windows, and what the prefix should earn is taken from the trajectory's suffix in place of
the reward of stopping there.

This is the idea as the paper's abstract and project page tell it, worked out anew. They describe a
target that replaces the prefix's stop reward; with q(⊤ | prefix) still in it, the residual would
not be zero at the true posterior. Here the target is the *flow* of the prefix, which the suffix of
any trajectory gives exactly at the optimum. The paper's replay is not here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from learner.objectives.base import Normalisation, ObjectiveInput, ObjectiveValue, Residuals
from learner.objectives.potential import (
    at_end,
    last_stops,
    log_z_of,
    path_log_probs,
    state_potentials,
)
from learner.objectives.traits import TRAITS


@dataclass(frozen=True)
class RootedPrefixBalance(Residuals):
    """Squared imbalance between the root and each prefix of a trajectory Z = z_1 .. z_n.

        sum_j (log Z(X) + sum_{k<t_j} log q(z_{k+1} | z_1:k) - u_j)^2
        u_j = log R(Z ⊤) / T - sum_{t_j<=k<n} log q(z_{k+1} | z_1:k) - log q(⊤ | Z)    no gradient

    over the stop states 0 < t_j < n, and over Z ⊤, whose suffix is empty and whose term is that of
    trajectory balance. Only the reward of the whole trajectory enters.

    All residuals of a trajectory are equal in *value*: that of trajectory balance, delta(Z). What
    differs is the gradient: a token gets delta times the number of prefixes that hold it, so early
    decisions get more than late ones, and ⊤ least.

    The optimum is that of trajectory balance and no other, for any behaviour mu with full support
    and a policy that is free in every state. Let x(Z) = mu(Z) delta(Z). The expected gradient at
    a state s is zero when q(. | s) splits among its actions the sum of w_s(Z) x(Z), w_s(Z) > 0
    the number of prefixes that hold that action. Going up from the leaves, all x behind a state
    then have one sign, hence all x at the root; log Z makes them sum to zero: delta = 0.
    """

    normalisation: Normalisation = "batch"

    traits: ClassVar = TRAITS["raptb"]

    def row_weights(self, stop_BS: Tensor) -> Tensor:
        """The stop states of each row but t = 0, which is the root; at least Z ⊤."""
        return stop_BS[:, 1:].sum(1).clamp(min=1)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        phi_BS = state_potentials(batch)
        log_z_B = log_z_of(batch, phi_BS)
        delta_B = (log_z_B + at_end(phi_BS, batch.stop_BS)).detach()
        state_S = torch.arange(phi_BS.shape[1], device=phi_BS.device)
        whole_BS = state_S == last_stops(batch.stop_BS)[:, None]
        path_BS = path_log_probs(batch.log_pf_BT)
        prefix_BS = torch.where(whole_BS, path_BS + batch.log_stop_BS, path_BS)
        one_BS = batch.stop_BS & ((state_S > 0) | whole_BS)
        prefix_BS = torch.where(one_BS, prefix_BS + log_z_B[:, None], 0.0)
        # The value is delta, the gradient that of the prefix and of log Z.
        residual_BS = delta_B[:, None] + (prefix_BS - prefix_BS.detach())
        loss_B = torch.where(one_BS, residual_BS, 0.0).square().sum(1)
        return self.value(loss_B, batch.stop_BS, log_z_B)
