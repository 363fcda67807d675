"""How much of what is drawn disagrees with the learner, and when that is too much."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.agreement.comparison import Comparison
from learner.broadcast import Unrecoverable

_WINDOW_DRAWS = 50
# Of fewer a share says little: a single damaged version of a single actor could end a run.
_MIN_JUDGED = 100
_NAMED_VERSIONS = 6


class SamplersDisagree(Unrecoverable):
    """Too many trajectories cannot have come from the weights that they name."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """What one draw brought."""

    judged: int  # trajectories whose actor and version were compared
    wrong: Sequence[Comparison]


class Disagreement:
    """The share of wrong trajectories over the last draws.

    Args:
        max_share: of the trajectories whose actor and version were compared.
        tolerance_nats: above which one was found wrong; for the messages.
    """

    def __init__(self, *, max_share: float, tolerance_nats: float) -> None:
        self._max_share = max_share
        self._tolerance_nats = tolerance_nats
        self._draws: deque[_Draw] = deque(maxlen=_WINDOW_DRAWS)

    def note(self, judged: int, wrong: Sequence[Comparison]) -> None:
        """Count one draw: `wrong` of the `judged` trajectories."""
        self._draws.append(_Draw(judged, wrong))

    def check(self, evidence: Path) -> None:
        """Raise SamplersDisagree when the share is above `max_share`; `evidence` is for people."""
        judged = sum(draw.judged for draw in self._draws)
        wrong = [outcome for draw in self._draws for outcome in draw.wrong]
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
        gap = max_gap(wrong)
        return (
            f"{wrong[0].trajectory.actor} at {_versions(wrong)} is off by up to {gap:.3g} nats "
            f"where {self._tolerance_nats:g} are tolerated"
        )


def max_gap(outcomes: Iterable[Comparison]) -> float:
    """Largest gap, nats; NaN if any recomputation gave NaN."""
    gaps = [outcome.gap_nats for outcome in outcomes if outcome.log_q_stop.size]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=math.nan)


def _versions(wrong: Sequence[Comparison]) -> str:
    versions = sorted({outcome.trajectory.policy_version for outcome in wrong})
    listed = ", ".join(map(str, versions[-_NAMED_VERSIONS:]))
    if len(versions) > _NAMED_VERSIONS:
        return f"{len(versions)} versions, the last of them {listed}"
    return f"{'versions' if len(versions) > 1 else 'version'} {listed}"
