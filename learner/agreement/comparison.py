"""What the learner says of trajectories beside what their samplers recorded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from buffer.replay import Group
from buffer.trajectory import Trajectory
from learner.batch import Batch, check_actions, collate, row_log_probs, split_rows
from lm.actions import ActionSpace

Pair = tuple[str, int]  # an actor, and the policy version that it claims


def pair_of(trajectory: Trajectory) -> Pair:
    return trajectory.actor, trajectory.policy_version


def _nothing() -> NDArray[np.float32]:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Gap:
    """How far log q recomputed is from log q recorded, over decisions of several trajectories."""

    decisions: int
    rms_nats: float
    mean_nats: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """A trajectory, and what the learner says of it under the version that it claims."""

    trajectory: Trajectory
    learner_version: int  # of the draw
    # Where its version's weights are gone, nothing was recomputed.
    rms_nats: float = math.nan  # root mean square of log q recomputed - recorded
    mean_nats: float = math.nan  # its mean
    log_q_token: NDArray[np.float32] = field(default_factory=_nothing)  # [L] recomputed, nats
    log_q_stop: NDArray[np.float32] = field(default_factory=_nothing)  # [S] likewise

    @property
    def decisions(self) -> int:
        return num_decisions(self.trajectory)


def num_decisions(trajectory: Trajectory) -> int:
    """Tokens that the policy chose, and stop states: where its log q can be compared."""
    return int((~trajectory.from_tool).sum()) + trajectory.stops.size


def log_q_differences(
    batch: Batch, log_pf_BT: Tensor, log_stop_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Log q recomputed - recorded of every token that was chosen and every stop state.

    Args:
        log_pf_BT, log_stop_BS: recomputed for the rows of `batch`, nats.

    Returns:
        [B, T + S] in nats, 0 where there is nothing to compare; and where there is, as bool.
    """
    counted_BN = torch.cat([batch.chosen_BT, batch.stop_BS], dim=1)
    recomputed_BN = torch.cat([log_pf_BT, log_stop_BS], dim=1).detach()
    recorded_BN = torch.cat([batch.behaviour_log_prob_BT, batch.behaviour_log_stop_BS], dim=1)
    return (recomputed_BN - recorded_BN).masked_fill(~counted_BN, 0.0), counted_BN


@torch.no_grad()
def compare(
    model: nn.Module,
    actions: ActionSpace,
    trajectories: Sequence[Trajectory],
    *,
    learner_version: int,
    token_budget: int,
) -> list[Comparison]:
    """Compare trajectories, at least one, with the weights that `model` holds now, in order.

    In passes of `token_budget` columns, which a single trajectory may exceed. Raises
    IllegalCompletion where one was sampled under other rules.
    """
    group = Group(prompt_key="", fresh=tuple(trajectories), replayed=())
    check_actions([group], actions)
    batch = collate([group], next(model.parameters()).device)
    parts = [
        row_log_probs(model, actions, batch, rows)[:2] for rows in split_rows(batch, token_budget)
    ]
    log_pf_BT, log_stop_BS = (torch.cat(rows)[batch.row_B] for rows in zip(*parts, strict=True))
    difference_BN, counted_BN = log_q_differences(batch, log_pf_BT, log_stop_BS)
    difference_BN, decisions_B = difference_BN.double(), counted_BN.sum(dim=1)
    rms_B = (difference_BN.square().sum(dim=1) / decisions_B).sqrt()
    mean_B = difference_BN.sum(dim=1) / decisions_B
    arrays = (t.cpu().numpy() for t in (rms_B, mean_B, log_pf_BT, log_stop_BS))
    return [
        Comparison(
            trajectory=trajectory,
            learner_version=learner_version,
            rms_nats=float(rms),
            mean_nats=float(mean),
            log_q_token=token_T[: trajectory.completion.size],
            log_q_stop=stop_S[trajectory.stops],
        )
        for trajectory, rms, mean, token_T, stop_S in zip(trajectories, *arrays, strict=True)
    ]
