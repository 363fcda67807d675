"""Curves of a run from its metrics file."""

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from cluster.inspector.charts import Chart, Series, number
from cluster.reports.plots import smooth
from cluster.run.display import FIGURES, Figure
from cluster.run.metrics_log import rows_in

_POINTS = 400
_STEP = "step"


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps."""

    key: str
    label: str
    last: str
    chart: Markup
    is_headline: bool


class RowsByStep:
    """The finite numbers of each whole row of a metrics file, in the order of their steps.

    A run that was resumed writes the steps after its checkpoint again: the later row counts. What
    has been read is kept, and the next look reads on behind it; another file, or one that has
    become shorter, is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._read: tuple[int, int] = (0, 0)  # number of the file, bytes of it
        self._rows: dict[float, Mapping[str, float]] = {}

    def rows(self) -> list[Mapping[str, float]]:
        """All that there are now."""
        with self._lock:
            self._read_on()
            return [self._rows[step] for step in sorted(self._rows)]

    def _read_on(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            number, done = self._read
            if status.st_ino != number or status.st_size < done:
                self._rows, done = {}, 0
            file.seek(done)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read = status.st_ino, done + len(whole + end)
        for row in rows_in(whole):
            known = {
                k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)
            }
            if _STEP in known:
                self._rows[known[_STEP]] = known


def draw_curves(rows: Sequence[Mapping[str, float]]) -> list[Curve]:
    """A curve for every metric of the rows, those that a run is judged by first."""
    known = {figure.key: figure for figure in FIGURES}
    keys = {key for row in rows for key in row} - {_STEP}
    curves = []
    for key in [*(key for key in known if key in keys), *sorted(keys - known.keys())]:
        points_N2 = np.array([(row[_STEP], row[key]) for row in rows if key in row], dtype=float)
        means = smooth(points_N2[:, 1])
        smoothed_N2 = np.column_stack([points_N2[:, 0], means])
        series = [Series(thin(points_N2), "faint"), Series(thin(smoothed_N2), "line")]
        figure = known.get(key, Figure(key, key, number))
        curves.append(
            Curve(
                key=key,
                label=figure.label,
                last=figure.write(means[-1]),
                chart=Chart(title=f"{key} over steps", series=series).svg(),
                is_headline=key in known,
            )
        )
    return curves


def thin(points_N2: NDArray[np.float64]) -> list[tuple[float, float]]:
    """At most _POINTS of the points: means of equally many neighbours."""
    starts = np.arange(0, len(points_N2), -(-len(points_N2) // _POINTS))
    counts = np.diff(starts, append=len(points_N2))
    means_M2 = np.add.reduceat(points_N2, starts) / counts[:, None]
    return [(x, y) for x, y in means_M2.tolist()]
