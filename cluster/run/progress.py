"""From counters and rows to the figures that are recorded and shown."""

import time
from collections import deque
from collections.abc import Mapping
from statistics import fmean

from cluster.run.display import (
    BUFFER_SIZE,
    ELAPSED_S,
    TIME_LEFT_S,
    TRAJECTORIES,
    TRAJECTORIES_PER_S,
)

_WINDOW_S = 20.0
# A curve of single batches is noise: shown figures average the last rows.
_SHOWN_ROWS = 10


class Progress:
    """Rates over the last seconds, averages over the last rows, and the time that is left."""

    def __init__(self, steps: int, time_limit_s: float | None) -> None:
        self._steps = steps  # of the whole run
        self._time_limit_s = time_limit_s  # of training; None for none
        self._rows: deque[Mapping[str, float]] = deque(maxlen=_SHOWN_ROWS)
        self._marks: deque[tuple[float, float, float]] = deque()  # clock, trajectories, step
        self._began_s: float | None = None

    def begin(self) -> None:
        self._began_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s

    @property
    def time_is_up(self) -> bool:
        return self._time_limit_s is not None and self.elapsed_s >= self._time_limit_s

    def row(self, row: Mapping[str, float], *, step: int) -> dict[str, float]:
        """The learner's row as it is recorded: with its step and the driver's figures."""
        self._rows.append(row)
        return {"step": float(step), ELAPSED_S: self.elapsed_s, **row, **self._trajectory_rate()}

    def observe(self, *, trajectories: float, step: int) -> None:
        """Note the counters at this moment."""
        now = time.monotonic()
        self._marks.append((now, trajectories, float(step)))
        while now - self._marks[0][0] > _WINDOW_S:
            self._marks.popleft()

    def shown(self, *, buffer_size: int) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for row in self._rows:
            for key, value in row.items():
                values.setdefault(key, []).append(value)
        figures = {key: fmean(each) for key, each in values.items()}
        figures |= {BUFFER_SIZE: float(buffer_size), ELAPSED_S: self.elapsed_s}
        if self._marks:
            figures[TRAJECTORIES] = self._marks[-1][1]
        if (left_s := self._left_s()) is not None:
            figures[TIME_LEFT_S] = left_s
        return figures | self._trajectory_rate()

    def _trajectory_rate(self) -> dict[str, float]:
        rate = self._rate(1)
        return {} if rate is None else {TRAJECTORIES_PER_S: rate}

    def _rate(self, column: int) -> float | None:
        """Growth of one column of the marks per second."""
        if len(self._marks) < 2 or self._marks[-1][0] == self._marks[0][0]:
            return None
        first, last = self._marks[0], self._marks[-1]
        return (last[column] - first[column]) / (last[0] - first[0])

    def _left_s(self) -> float | None:
        limits = []
        steps_per_s = self._rate(2) or 0.0
        if steps_per_s > 0:  # a learner that was lost goes on from an earlier step
            limits.append((self._steps - self._marks[-1][2]) / steps_per_s)
        if self._time_limit_s is not None and self._began_s is not None:
            limits.append(max(0.0, self._time_limit_s - self.elapsed_s))
        return min(limits, default=None)
