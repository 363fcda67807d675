"""Weights that arrive late, or in turns, on purpose: to measure what staleness does."""

import time
from collections import deque
from collections.abc import Callable

from actors.protocols import PublishedWeights, WeightSource

_POLL_S = 0.005


class LaggingWeights:
    """Hands out the newest version that is at least `lag` behind the newest.

    Nothing ever gets more than `max_lag` behind, or the buffer would drop all that is sampled and
    the learner starve. An actor keeps the version it has, at the start version 0, for as long as
    that allows; then it takes the oldest version that it has seen published since. That is younger
    than `lag` for an actor that joins late or asks so seldom that it never saw the one due.

    Args:
        source: where the newest appears.
        lag: versions, above 0.
        max_lag: versions, at least `lag`.
    """

    def __init__(self, source: WeightSource, *, lag: int, max_lag: int) -> None:
        if not 0 < lag <= max_lag:
            raise ValueError(f"lag {lag}, max_lag {max_lag}: need 0 < lag <= max_lag")
        self._source = source
        self._lag = lag
        self._max_lag = max_lag
        self._seen: deque[PublishedWeights] = deque()  # oldest first; at most one is due
        self._newest = -1

    def newer_than(self, version: int) -> PublishedWeights | None:
        """What is to be taken instead of `version`; None to keep that."""
        if (fresh := self._source.newer_than(self._newest)) is not None:
            self._seen.append(fresh)
            self._newest = fresh.version
        while len(self._seen) > 1 and self._seen[1].version <= self._newest - self._lag:
            self._seen.popleft()
        ages = (self._newest - seen.version for seen in self._seen)
        oldest = next((n for n, age in enumerate(ages) if age <= self._max_lag), None)
        if oldest is None or self._seen[oldest].version <= version:
            return None
        is_due = self._newest - self._seen[oldest].version >= self._lag
        must_go = self._newest - version > self._max_lag
        return self._seen[oldest] if is_due or must_go else None


class TakingTurns:
    """Sampling and learning in turns: every published version once, after a wait for the next.

    With one actor that stores a batch before it asks (`max_in_flight` 1), and a learner that draws
    just that batch, nobody works while another does.

    Args:
        source: where the newest appears.
        stop: ends a wait.
        timeout_s: longest wait.
    """

    def __init__(
        self, source: WeightSource, stop: Callable[[], bool], *, timeout_s: float = 600.0
    ) -> None:
        self._source = source
        self._stop = stop
        self._timeout_s = timeout_s
        self._begun = False

    def newer_than(self, version: int) -> PublishedWeights | None:
        """The first weights newer than `version`; None at the start, or when stopped.

        Raises:
            TimeoutError: the learner published nothing for `timeout_s`.
        """
        began = time.monotonic()
        while (fresh := self._source.newer_than(version)) is None and self._begun:
            if self._stop():
                break
            if (waited := time.monotonic() - began) > self._timeout_s:
                raise TimeoutError(
                    f"learner: no version after {version} was published within {waited:.0f} s"
                )
            time.sleep(_POLL_S)
        self._begun = True
        return fresh
