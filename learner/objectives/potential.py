"""The potential whose differences are the imbalances of the objectives, and its value at the root.

Shapes: B trajectories, T tokens of the longest completion, S = T + 1 states.
"""

import torch
from torch import Tensor

from learner.objectives.base import ObjectiveInput


def path_log_probs(log_pf_BT: Tensor) -> Tensor:
    """log q of reaching each state from the prompt, [B, S] nats; what follows padding is junk."""
    return torch.nn.functional.pad(log_pf_BT.cumsum(dim=1), (1, 0))


def state_potentials(batch: ObjectiveInput) -> Tensor:
    """Potential of every stop state, [B, S] nats; 0 elsewhere.

    With stopping allowed, a state's flow is F(s) = R(s stop) / q(stop | s), and P_B = 1 on the
    tree of prefixes. Balance between two states then telescopes into a difference of

        phi_t = sum_{k<t} log q(z_{k+1} | z_1:k) + log q(stop | z_1:t) - log R(z_1:t stop).

    At the optimum every phi_t of a prompt is -log Z.
    """
    shape = batch.stop_BS.shape
    assert batch.log_stop_BS.shape == shape, (batch.log_stop_BS.shape, shape)
    assert batch.log_reward_BS.shape == shape, (batch.log_reward_BS.shape, shape)
    phi_BS = path_log_probs(batch.log_pf_BT) + batch.log_stop_BS - batch.log_reward_BS
    # Everything before is a sum, so that nothing of -inf or NaN padding gets past this choice.
    return torch.where(batch.stop_BS, phi_BS, 0.0)


def at_end(values_BS: Tensor, stop_BS: Tensor) -> Tensor:
    """[B] the value of each row at its last stop state."""
    return values_BS.gather(1, last_stops(stop_BS)[:, None]).squeeze(1)


def last_stops(stop_BS: Tensor) -> Tensor:
    """Length of each completion: where the last stop state stands, [B] int64."""
    return stop_BS.shape[1] - 1 - stop_BS.flip(1).to(torch.int8).argmax(dim=1)


def log_z_of(batch: ObjectiveInput, phi_BS: Tensor) -> Tensor:
    """log Z of each row's prompt, [B] nats: what was learned, else the group's estimate."""
    if batch.log_z_B is not None:
        return batch.log_z_B
    return estimate_log_z(at_end(phi_BS, batch.stop_BS), batch.group_B)


def estimate_log_z(terminal_phi_B: Tensor, group_B: Tensor) -> Tensor:
    """log Z of each row's prompt, from the prompt's rows in this batch: [B] nats, detached.

    VarGrad's estimate (Richter et al. 2020; Zhang et al. 2023): the mean over the group of
    log R(Z) - log q(Z). It needs no behaviour policy, hence any mixture of trajectories will do;
    with one trajectory it is that trajectory's own value, and says nothing about the others.
    """
    total_B, count_B = group_sums(-terminal_phi_B.detach(), group_B)
    return total_B / count_B


def group_sums(value_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """[B] sum of the values of each row's group, and [B] how many they are."""
    total_G = torch.zeros_like(value_B).index_add(0, group_B, value_B)
    count_G = torch.zeros_like(value_B).index_add(0, group_B, torch.ones_like(value_B))
    return total_G[group_B], count_G[group_B]


def with_root(phi_BS: Tensor, stop_BS: Tensor, log_z_B: Tensor) -> tuple[Tensor, Tensor]:
    """Stop states moved together to the left, after the root where t = 0 is no stop state.

    There nothing in differences of stop states ties the trajectories of a prompt together: the
    distribution over first stop states would stay free. So the root enters as one more state
    before the first, with its flow Z: phi = -log Z.

    Returns:
        [B, N] potentials and [B, N] bool, N = S + 1; real states come first in each row.
    """
    phi_BN = torch.cat([-log_z_B[:, None], phi_BS], dim=1)
    real_BN = torch.cat([~stop_BS[:, :1], stop_BS], dim=1)
    order_BN = (~real_BN).to(torch.int8).argsort(dim=1, stable=True)
    return phi_BN.gather(1, order_BN), real_BN.gather(1, order_BN)


def count_states(stop_BS: Tensor) -> Tensor:
    """States of each trajectory, the root included where it enters: [B] int64."""
    return stop_BS.sum(1) + (~stop_BS[:, 0]).long()
