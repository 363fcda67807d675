"""Reward maximisation with a penalty on leaving the base LM, by PPO's clipped surrogate.

Schulman et al. 2017 ("Proximal policy optimization algorithms", eq. 7) for the surrogate; the
penalty inside the return as Ziegler et al. 2019 (eq. 2) have it; the baseline of a group as Kool et
al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free") and Ahmadian et al. 2024 (RLOO). No
value network: only whole completions have a reward.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from learner.objectives.base import ObjectiveInput, ObjectiveValue, PerTrajectory
from learner.objectives.potential import at_end, group_sums, last_stops, path_log_probs
from learner.objectives.traits import TRAITS


class NotOnPolicy(ValueError):
    """The objective was given rows without what their sampler and the base LM say of them."""


@dataclass(frozen=True)
class ClippedPolicyGradient(PerTrajectory):
    """Clipped surrogate of the expected return, a mean over trajectories.

    With mu the policy that sampled Z, at its version, and p_0 the base LM as a policy (adapter off,
    the same legal tokens and stop states):

        G(Z)     = log R(Z ⊤) / T - kl (log mu(Z ⊤ | X) - log p_0(Z ⊤ | X))
        A(Z)     = G(Z) - mean of G over the other trajectories of the prompt
        rho_k    = q(a_k | z_1:k) / mu(a_k | z_1:k)       a_k: a chosen token, or the final ⊤
        loss     = - sum_k min((rho_k - 1) A, (clip(rho_k, 1 - clip, 1 + clip) - 1) A)

    which is PPO's less A per action, so that a tool's tokens, probability 1, add nothing. Where
    q = mu, the gradient is that of

        - E_q[log R / T] + kl KL(q || p_0)

    without bias. Its optimum is q ∝ p_0 R^(1/(T kl)): not the posterior R^(1/T), but ever more of
    its largest mode as kl goes to 0. A prompt with a single trajectory teaches nothing.
    """

    clip: float = 0.2
    kl: float = 0.2

    traits: ClassVar = TRAITS["ppo"]

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        sampled_pf_BT, sampled_stop_BS = batch.behaviour_log_prob_BT, batch.behaviour_log_stop_BS
        base_pf_BT, base_stop_BS = batch.base_log_pf_BT, batch.base_log_stop_BS
        if sampled_pf_BT is None or sampled_stop_BS is None:
            raise NotOnPolicy("PPO needs the log q that the samplers recorded")
        if base_pf_BT is None or base_stop_BS is None:
            raise NotOnPolicy("PPO needs the log q of the base LM")
        stop_BS = batch.stop_BS
        end_B1 = last_stops(stop_BS)[:, None]
        gap_BS = path_log_probs(sampled_pf_BT - base_pf_BT) + sampled_stop_BS - base_stop_BS
        gap_B = at_end(gap_BS, stop_BS)
        return_B = at_end(batch.log_reward_BS, stop_BS) - self.kl * gap_B
        advantage_B1 = advantages(return_B, batch.group_B)[:, None]
        token_T = torch.arange(batch.log_pf_BT.shape[1], device=stop_BS.device)
        log_token_BT = torch.where(token_T < end_B1, batch.log_pf_BT - sampled_pf_BT, 0.0)
        log_end_B1 = (batch.log_stop_BS - sampled_stop_BS).gather(1, end_B1)
        change_BN = torch.cat([log_token_BT, log_end_B1], dim=1).expm1()  # rho - 1
        clipped_BN = change_BN.clamp(-self.clip, self.clip)
        gain_BN = torch.minimum(change_BN * advantage_B1, clipped_BN * advantage_B1)
        cut_B = (gain_BN.detach() != change_BN.detach() * advantage_B1).any(dim=1)
        metrics = {"kl_to_base_nats": gap_B.sum(), "clipped_share": cut_B.sum()}
        return ObjectiveValue(-gain_BN.sum(), metrics)


def advantages(return_B: Tensor, group_B: Tensor) -> Tensor:
    """Each return less the mean of the others of its group, [B], detached; 0 in a group of one."""
    total_B, count_B = group_sums(return_B.detach(), group_B)
    others_B = (total_B - return_B.detach()) / (count_B - 1).clamp(min=1)
    return torch.where(count_B > 1, return_B.detach() - others_B, 0.0)
