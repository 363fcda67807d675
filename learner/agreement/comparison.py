"""How far learner and sampler may differ on log q, and how often.

The sampler computes it token by token with a cache, the learner in one teacher-forced pass: where
their weights are the same, only rounding parts them.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from buffer.replay import Group
from buffer.trajectory import Trajectory
from learner.batch import Batch, check_actions, collate, row_log_probs, split_rows
from learner.broadcast import Unrecoverable
from lm.actions import ActionSpace

# Largest gaps seen between honest parts, nats: 1.5e-5 in float32, 0.13 in bfloat16, both with up
# to 12 layers and 20,000 tokens. Deeper models round more; damage is larger still.
_FLOAT32_TOLERANCE_NATS = 1e-3
_ROUGH_TOLERANCE_NATS = 0.5

_WINDOW_DRAWS = 50
# Of fewer a share says little: a single damaged version of a single actor could end a run.
_MIN_JUDGED = 100
_NAMED_VERSIONS = 6


def _nothing() -> NDArray[np.float32]:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """A trajectory, and what the learner says of it under the version that it claims."""

    trajectory: Trajectory
    learner_version: int  # of the draw
    # Where its version's weights are gone, nothing was recomputed.
    gap_nats: float = math.nan  # largest |log q recomputed - recorded|
    log_q_token: NDArray[np.float32] = field(default_factory=_nothing)  # [L] recomputed, nats
    log_q_stop: NDArray[np.float32] = field(default_factory=_nothing)  # [S] likewise


def log_q_gaps(batch: Batch, log_pf_BT: Tensor, log_stop_BS: Tensor) -> tuple[Tensor, Tensor]:
    """|log q recomputed - recorded| of every token that was chosen and every stop state.

    Args:
        log_pf_BT, log_stop_BS: recomputed for the rows of `batch`, nats.

    Returns:
        [B, T + S] gaps in nats, 0 where there is nothing to compare; and where there is, as bool.
    """
    counted_BN = torch.cat([batch.chosen_BT, batch.stop_BS], dim=1)
    recomputed_BN = torch.cat([log_pf_BT, log_stop_BS], dim=1).detach()
    recorded_BN = torch.cat([batch.behaviour_log_prob_BT, batch.behaviour_log_stop_BS], dim=1)
    return (recomputed_BN - recorded_BN).abs().masked_fill(~counted_BN, 0.0), counted_BN


def rounding_tolerance(model: nn.Module) -> float:
    """Gap in nats that rounding in the precision of this model's weights does not reach."""
    rough = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return _ROUGH_TOLERANCE_NATS if rough else _FLOAT32_TOLERANCE_NATS


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
    gap_BN, _ = log_q_gaps(batch, log_pf_BT, log_stop_BS)
    arrays = (t.cpu().numpy() for t in (gap_BN.amax(dim=1), log_pf_BT, log_stop_BS))
    return [
        Comparison(
            trajectory=trajectory,
            learner_version=learner_version,
            gap_nats=float(gap),
            log_q_token=token_T[: trajectory.completion.size],
            log_q_stop=stop_S[trajectory.stops],
        )
        for trajectory, gap, token_T, stop_S in zip(trajectories, *arrays, strict=True)
    ]


class SamplersDisagree(Unrecoverable):
    """Too many trajectories cannot have come from the weights that they name."""


class Disagreement:
    """The share of wrong trajectories over the last draws.

    Args:
        max_share: of the trajectories whose actor and version were compared.
        tolerance_nats: above which one was found wrong; for the messages.
    """

    def __init__(self, *, max_share: float, tolerance_nats: float) -> None:
        self._max_share = max_share
        self._tolerance_nats = tolerance_nats
        self._draws: deque[tuple[int, Sequence[Comparison]]] = deque(maxlen=_WINDOW_DRAWS)

    def note(self, judged: int, wrong: Sequence[Comparison]) -> None:
        """Count one draw: `wrong` of the `judged` trajectories."""
        self._draws.append((judged, wrong))

    def check(self, evidence: Path) -> None:
        """Raise SamplersDisagree when the share is above `max_share`; `evidence` is for people."""
        judged = sum(judged for judged, _ in self._draws)
        wrong = [outcome for _, of_draw in self._draws for outcome in of_draw]
        if judged < _MIN_JUDGED or len(wrong) <= self._max_share * judged:
            return
        actors = sorted({outcome.trajectory.actor for outcome in wrong})
        raise SamplersDisagree(
            f"{len(wrong)} of {judged} trajectories in the last {len(self._draws)} draws disagree "
            f"with the learner on log q, above learner.agreement_max_share = {self._max_share:g}: "
            + "; ".join(
                self.describe([o for o in wrong if o.trajectory.actor == actor]) for actor in actors
            )
            + f". They are kept in {evidence}. What these actors hold in memory, or their "
            "software, is not the learner's: see to their machines, then go on from the last "
            "checkpoint with --resume. Raise learner.agreement_tolerance_nats only if the gaps "
            "are rounding"
        )

    def describe(self, wrong: Sequence[Comparison]) -> str:
        """Wrong trajectories of one actor: who, of which versions, by how much."""
        gaps = [outcome.gap_nats for outcome in wrong if outcome.log_q_stop.size]
        gap = float(np.max(gaps)) if gaps else math.nan  # NaN if any recomputation gave NaN
        return (
            f"{wrong[0].trajectory.actor} at {_versions(wrong)} is off by up to {gap:.3g} nats "
            f"where {self._tolerance_nats:g} are tolerated"
        )


def _versions(wrong: Sequence[Comparison]) -> str:
    versions = sorted({outcome.trajectory.policy_version for outcome in wrong})
    listed = ", ".join(map(str, versions[-_NAMED_VERSIONS:]))
    if len(versions) > _NAMED_VERSIONS:
        return f"{len(versions)} versions, the last of them {listed}"
    return f"{'versions' if len(versions) > 1 else 'version'} {listed}"
