"""What the learner's own pass says of who sampled: who is moved by more than learning explains.

Under the learner's weights log q of an earlier version's trajectory is not what was recorded: the
policy has moved since. By how much says

    x = log (sum |log q now - recorded| / sum (1 - recorded q)),    sums over the decisions,

which depends little on how certain these were: where a logit moves by s, log q moves by s (1 - q).
Of honest actors x is level + slope log(age) + noise. The level is common to all and wanders with
the pace of learning; the slope is 1/2 where steps go different ways, 1 where they go the same. A
Kalman filter follows both. Each actor is held against what the others of the step, and the steps
before, let expect of it.

One hearing is noisy: evidence adds up over several, in Page's test (CUSUM), which finds a lasting
change as soon as a test can that is wrong as seldom.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from learner.agreement.comparison import Gap, Pair

_SHIFT = 0.5  # of x, where an actor has changed: it seems to be moved 1.6 times as far
_LIMIT_NATS = 3.0  # of evidence for that, above which an actor has changed
_DRIFT = 0.15  # standard deviation of the level's change in a step
_SLOPE, _SLOPE_SPREAD, _SLOPE_DRIFT = 0.75, 0.2, 0.01
# x that is further from what was expected, in standard deviations, is taken for nearer.
_CLIP = 2.0
_CLIPPED_SQUARE = 0.9205  # mean of the square of a standard normal number that is clipped there
# Variance of x of one trajectory, below which it is not learned: log q is rounded in any case.
_LEAST_NOISE = 1e-3
_NOISE_RATES = (0.1, 0.02)  # at which the noise is learned, at first and at last


_Observation = tuple[float, float, float]  # logarithm of the age, x, weight


class Belief(NamedTuple):
    """Of level and slope, Gaussian: precision [[a, b], [b, c]], and its product with the mean."""

    a: float
    b: float
    c: float
    y0: float
    y1: float

    def seeing(self, log_age: float, x: float, weight: float) -> "Belief":
        """After an observation of level + slope * log_age."""
        a, b, c, y0, y1 = self
        of_slope = weight * log_age
        return Belief(
            a + weight, b + of_slope, c + of_slope * log_age, y0 + weight * x, y1 + of_slope * x
        )

    def expects(self, log_age: float) -> tuple[float, float]:
        """Mean and variance of level + slope * log_age."""
        a, b, c, y0, y1 = self
        mean = c * y0 - b * y1 + log_age * (a * y1 - b * y0)
        variance = c - 2 * log_age * b + log_age**2 * a
        return mean / (a * c - b * b), variance / (a * c - b * b)

    def later(self, steps: int) -> "Belief":
        """After so many steps, in which level and slope have wandered."""
        a, b, c, y0, y1 = self
        det = a * c - b * b
        level, slope = (c * y0 - b * y1) / det, (a * y1 - b * y0) / det
        p00, p01, p11 = c / det + _DRIFT**2 * steps, -b / det, a / det + _SLOPE_DRIFT**2 * steps
        det = p00 * p11 - p01 * p01
        a, b, c = p11 / det, -p01 / det, p00 / det
        return Belief(a, b, c, a * level + b * slope, b * level + c * slope)


_AT_FIRST = Belief(1e-4, 0.0, _SLOPE_SPREAD**-2, 0.0, _SLOPE * _SLOPE_SPREAD**-2)


@dataclass(slots=True)
class _Doubt:
    """Evidence that an actor has changed."""

    nats: float = 0.0
    since: int = 0  # the oldest version heard since there was none


class Hearing:
    """Follows what is usual, and collects evidence of who differs from it."""

    def __init__(self) -> None:
        self._belief = _AT_FIRST
        self._version = 0  # of the last step
        self._noise = 0.5  # variance of x of one trajectory
        self._noise_rate = _NOISE_RATES[0]
        self._doubts: defaultdict[str, _Doubt] = defaultdict(_Doubt)

    def take(self, gaps: Mapping[Pair, Gap], version: int) -> dict[str, int]:
        """Hear one step; who has changed, and the oldest version with which that may have begun."""
        heard: dict[str, list[tuple[int, Gap]]] = {}
        for (actor, sampled_at), gap in sorted(gaps.items()):
            if gap.fresh and sampled_at < version:
                heard.setdefault(actor, []).append((sampled_at, gap))
        if not heard:
            return {}
        before = self._belief.later(max(version - self._version, 1))
        seen = {
            actor: [self._bounded(before, math.log(version - at), gap) for at, gap in each]
            for actor, each in heard.items()
        }
        self._belief, self._version = _after(before, seen), version
        changed = {}
        for actor, each in heard.items():
            # Added up: what is taken away again leaves the rounding of what was there.
            others = _after(before, {name: seen[name] for name in seen if name != actor})
            if self._weigh(actor, each, others) > _LIMIT_NATS:
                changed[actor] = self._doubts[actor].since
        return changed

    def forget(self, actor: str) -> None:
        """No evidence is left against this actor."""
        self._doubts.pop(actor, None)

    def save(self) -> list[Any]:
        doubts = {actor: [doubt.nats, doubt.since] for actor, doubt in self._doubts.items()}
        return [self._belief, self._version, [self._noise, self._noise_rate], doubts]

    def restore(
        self,
        belief: Sequence[float],
        version: int,
        noise: Sequence[float],
        doubts: Mapping[str, Any],
    ) -> None:
        """Know what was known at the moment of `save`."""
        variance, self._noise_rate = noise
        # What was learned with less noise than this may have lost all its digits.
        self._belief = Belief(*belief) if variance >= _LEAST_NOISE else _AT_FIRST
        self._version, self._noise = version, max(variance, _LEAST_NOISE)
        self._doubts.update((actor, _Doubt(*doubt)) for actor, doubt in doubts.items())

    def _weigh(self, actor: str, heard: Sequence[tuple[int, Gap]], others: Belief) -> float:
        """The evidence against this actor once it is heard beside the others, nats."""
        doubt = self._doubts[actor]
        for sampled_at, gap in heard:
            doubt.since = min(doubt.since, sampled_at) if doubt.nats > 0 else sampled_at
            if not math.isfinite(gap.moved):
                doubt.nats = math.inf
                continue
            mean, variance = others.expects(math.log(self._version - sampled_at))
            variance += self._noise / gap.fresh
            excess = gap.moved - mean
            doubt.nats = max(doubt.nats + _SHIFT / variance * (excess - _SHIFT / 2), 0.0)
            surprise = min(excess**2 / variance, _CLIP**2) - _CLIPPED_SQUARE
            learned = self._noise * math.exp(self._noise_rate * surprise)
            self._noise = max(learned, _LEAST_NOISE)
            self._noise_rate = max(self._noise_rate / (1 + self._noise_rate), _NOISE_RATES[1])
        return doubt.nats

    def _bounded(self, before: Belief, log_age: float, gap: Gap) -> _Observation:
        """What `Belief.seeing` takes of a gap: who is far off shifts nobody else's norm."""
        weight = gap.fresh / self._noise
        mean, variance = before.expects(log_age)
        most = _CLIP * math.sqrt(variance + 1 / weight)
        excess = gap.moved - mean if math.isfinite(gap.moved) else 0.0
        return log_age, mean + max(-most, min(most, excess)), weight


def _after(belief: Belief, seen: Mapping[str, Sequence[_Observation]]) -> Belief:
    """The belief after all that these actors have shown."""
    for observations in seen.values():
        for observation in observations:
            belief = belief.seeing(*observation)
    return belief
