"""How far learner and sampler may differ on log q where only rounding parts them, and how often.

The sampler computes it token by token with a cache, or in an engine of its own, the learner in one
teacher-forced pass. d_i = log q recomputed - recorded, over the N decisions of a trajectory: tokens
that the policy chose, and stop states.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import nn

from learner.agreement.comparison import Comparison, Gap
from learner.broadcast import Unrecoverable

# The largest d_i grows with the number of decisions, the root mean square does not: an honest
# trajectory comes within 2 of the scale however long it is, and a short one has the allowance of a
# few draws of heavy tails. Errors that all have one sign add up in the loss, which sees sums: their
# mean is held closer. tests/test_tolerance.py has what was measured in bfloat16 over 2,000 tokens.
_RMS_FACTOR = 2.0
_MEAN_FACTOR = 0.25
_SHORT_FACTOR = 6.0

# Decisions after which the scale is known well enough, and draws after which it has to be.
_CALIBRATING_DECISIONS = 500
_CALIBRATING_DRAWS = 3

_WINDOW_DRAWS = 50
# Of fewer a share says little: a single damaged version of a single actor could end a run.
_MIN_JUDGED = 100
_NAMED_VERSIONS = 6


@dataclass(frozen=True, slots=True)
class Rounding:
    """Root mean squares of d in nats: the least that is tolerated, and the most."""

    floor_nats: float
    bound_nats: float


_FINE = Rounding(floor_nats=3e-5, bound_nats=1e-3)
_ROUGH = Rounding(floor_nats=1e-2, bound_nats=0.25)


def rounding_of(model: nn.Module) -> Rounding:
    """By the precision in which this model's products are computed."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        return _ROUGH
    on_gpu = next(model.parameters()).device.type == "cuda"
    return _ROUGH if on_gpu and torch.backends.cuda.matmul.allow_tf32 else _FINE


class Tolerance:
    """Says which comparisons rounding explains; learns in the first draws how rough it is here.

    The scale of rounding is the median over the actors of the root mean square of d of all that was
    compared of each, so that a minority of damaged actors does not shift it. With a single actor
    nothing but the bound tells damage at the very start from rounding.

    Args:
        rounding: between which the scale is sought.
        fixed_nats: the root mean square that is tolerated, instead of what would be learned.
    """

    def __init__(self, rounding: Rounding, *, fixed_nats: float | None = None) -> None:
        self._rounding = rounding
        self._fixed_nats = fixed_nats
        self._draws = 0
        self._squares: dict[str, list[float]] = {}  # by actor: sum of d^2, decisions

    @property
    def calibrating(self) -> bool:
        """Whether everything of the next draw is to be compared, for the scale's sake."""
        seen = sum(decisions for _, decisions in self._squares.values())
        enough = seen >= _CALIBRATING_DECISIONS or self._draws >= _CALIBRATING_DRAWS
        return self._fixed_nats is None and not enough

    def calibrate(self, compared: Iterable[Comparison]) -> None:
        """Learn from all that was compared of one draw, before any of it is judged."""
        self._draws += 1
        for outcome in compared:
            # Never true of NaN.
            if outcome.rms_nats <= self._rounding.bound_nats:
                of_actor = self._squares.setdefault(outcome.trajectory.actor, [0.0, 0])
                of_actor[0] += outcome.rms_nats**2 * outcome.decisions
                of_actor[1] += outcome.decisions

    def admits(self, outcome: Comparison | Gap) -> bool:
        """Whether rounding explains it; never where the recomputation gave NaN."""
        decisions = outcome.decisions
        return outcome.rms_nats <= self._rms_nats(decisions) and abs(
            outcome.mean_nats
        ) <= self._mean_nats(decisions)

    def excess(self, outcome: Comparison) -> str:
        """By how much it differs, and what is tolerated of that, in nats."""
        mean_nats, tolerated = abs(outcome.mean_nats), self._mean_nats(outcome.decisions)
        if outcome.rms_nats <= self._rms_nats(outcome.decisions):
            return f"{mean_nats:.3g} nats in the mean where {tolerated:.3g} are tolerated"
        tolerated = self._rms_nats(outcome.decisions)
        return f"{outcome.rms_nats:.3g} nats where {tolerated:.3g} are tolerated"

    def save(self) -> dict[str, Any]:
        return {"draws": self._draws, "squares": self._squares}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Know what was known at the moment of `save`."""
        self._draws = saved["draws"]
        self._squares = {actor: list(sums) for actor, sums in saved["squares"].items()}

    def _rms_nats(self, decisions: int) -> float:
        return self._allowed(_RMS_FACTOR, decisions)

    def _mean_nats(self, decisions: int) -> float:
        return self._allowed(_MEAN_FACTOR, decisions)

    def _allowed(self, factor: float, decisions: int) -> float:
        if self._fixed_nats is not None:
            return self._fixed_nats
        allowed = (factor + _SHORT_FACTOR / math.sqrt(decisions)) * self._scale_nats()
        return min(self._rounding.bound_nats, allowed)

    def _scale_nats(self) -> float:
        if not self._squares:
            return self._rounding.bound_nats
        of_actors = [math.sqrt(squares / count) for squares, count in self._squares.values()]
        return max(median_low(of_actors), self._rounding.floor_nats)


class SamplersDisagree(Unrecoverable):
    """Too many trajectories cannot have come from the weights that they name."""


class Disagreement:
    """The share of wrong trajectories over the last draws.

    Args:
        max_share: of the trajectories whose actor and version were compared.
        tolerance: by which they were found wrong; for the messages.
    """

    def __init__(self, *, max_share: float, tolerance: Tolerance) -> None:
        self._max_share = max_share
        self._tolerance = tolerance
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
        # NaN is worst, where a recomputation gave it; what was not recomputed says nothing.
        recomputed = [outcome for outcome in wrong if outcome.log_q_stop.size] or wrong
        worst = max(recomputed, key=lambda o: (math.isnan(o.rms_nats), o.rms_nats))
        return (
            f"{wrong[0].trajectory.actor} at {_versions(wrong)} is off by up to "
            f"{self._tolerance.excess(worst)}"
        )


def _versions(wrong: Sequence[Comparison]) -> str:
    versions = sorted({outcome.trajectory.policy_version for outcome in wrong})
    listed = ", ".join(map(str, versions[-_NAMED_VERSIONS:]))
    if len(versions) > _NAMED_VERSIONS:
        return f"{len(versions)} versions, the last of them {listed}"
    return f"{'versions' if len(versions) > 1 else 'version'} {listed}"
