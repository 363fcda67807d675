"""The potential whose differences are the imbalances of SubTB, and the log Z it estimates.

Shapes: B trajectories, T tokens of the longest completion, S = T + 1 states.
"""

import torch
from torch import Tensor


def state_potentials(
    log_pf_BT: Tensor, log_stop_BS: Tensor, log_reward_BS: Tensor, stop_BS: Tensor
) -> Tensor:
    """Potential of every stop state; 0 elsewhere.

    With stopping allowed, a state's flow is F(s) = R(s stop) / q(stop | s), and P_B = 1 on the
    tree of prefixes. Balance between two states then telescopes into a difference of

        phi_t = sum_{k<t} log q(z_{k+1} | z_1:k) + log q(stop | z_1:t) - log R(z_1:t stop).

    At the optimum every phi_t of a prompt is -log Z.

    Args:
        log_pf_BT: log q of token t+1 after t tokens, nats; 0 at tool tokens. Entries after the
            last stop state of a row are ignored, whatever they hold.
        log_stop_BS: log q(stop) after t tokens, nats. Ignored where stop_BS is False.
        log_reward_BS: tempered log R, nats. Ignored where stop_BS is False.
        stop_BS: bool, the policy may stop here; the last True of a row is its terminal state.

    Returns:
        [B, S] potentials in nats.
    """
    rows, states = stop_BS.shape
    assert log_pf_BT.shape == (rows, states - 1), (log_pf_BT.shape, stop_BS.shape)
    assert log_stop_BS.shape == stop_BS.shape, (log_stop_BS.shape, stop_BS.shape)
    assert log_reward_BS.shape == stop_BS.shape, (log_reward_BS.shape, stop_BS.shape)
    path_BS = torch.nn.functional.pad(log_pf_BT.cumsum(dim=1), (1, 0))
    # Everything before is a sum, so that nothing of -inf or NaN padding gets past this choice.
    return torch.where(stop_BS, path_BS + log_stop_BS - log_reward_BS, 0.0)


def terminal_potentials(phi_BS: Tensor, stop_BS: Tensor) -> Tensor:
    """phi of the last stop state of each row: log q(Z stop) - log R(Z stop), [B] nats."""
    last_B = stop_BS.shape[1] - 1 - stop_BS.flip(1).to(torch.int8).argmax(dim=1)
    return phi_BS.gather(1, last_B[:, None]).squeeze(1)


def estimate_log_z(terminal_phi_B: Tensor, group_B: Tensor) -> Tensor:
    """log Z of each row's prompt, from the prompt's rows in this batch: [B] nats, detached.

    VarGrad's estimate (Richter et al. 2020; Zhang et al. 2023): the mean over the group of
    log R(Z) - log q(Z). It needs no behaviour policy, hence any mixture of trajectories will do;
    with one trajectory it is that trajectory's own value, and says nothing about the others.

    Args:
        terminal_phi_B: potentials of the terminal states.
        group_B: int64, rows with the same number share their prompt; numbers are below B.
    """
    log_ratio_B = -terminal_phi_B.detach()
    total_G = torch.zeros_like(log_ratio_B).index_add(0, group_B, log_ratio_B)
    count_G = torch.zeros_like(log_ratio_B).index_add(0, group_B, torch.ones_like(log_ratio_B))
    return (total_G / count_G.clamp(min=1))[group_B]
