"""Curves of a run from its metrics file, of which each look reads the lines that are new."""

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cluster.inspector.charts import Chart, Series, number
from cluster.reports.plots import smooth
from cluster.run.display import FIGURES, Figure

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


class MetricsTail:
    """The rows of a metrics file by step; safe to share between threads.

    A run that was resumed writes the steps after its checkpoint again: the later row counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._offset = 0
        self._rows: dict[float, Mapping[str, float]] = {}

    def rows(self) -> list[Mapping[str, float]]:
        """All whole rows so far, in the order of their steps."""
        with self._lock:
            self._read_on()
            return [self._rows[step] for step in sorted(self._rows)]

    def _read_on(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        # A line that is still being written is for the next time.
        whole = data.rpartition(b"\n")[0]
        self._offset += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            row = _row(line)
            if _STEP in row:
                self._rows[row[_STEP]] = row


def _row(line: bytes) -> dict[str, float]:
    """The numbers of a line; none where it is torn."""
    try:
        fields = dict(json.loads(line))
    except (TypeError, ValueError):
        return {}
    numbers = ((k, float(v)) for k, v in fields.items() if isinstance(v, int | float))
    return {key: value for key, value in numbers if math.isfinite(value)}


def draw_curves(rows: Sequence[Mapping[str, float]]) -> list[Curve]:
    """A curve for every metric of the rows, those that a run is judged by first."""
    known = {figure.key: figure for figure in FIGURES}
    keys = {key for row in rows for key in row} - {_STEP}
    curves = []
    for key in [*(key for key in known if key in keys), *sorted(keys - known.keys())]:
        points = [(row[_STEP], row[key]) for row in rows if key in row]
        means = smooth([value for _, value in points])
        smoothed = [(step, mean) for (step, _), mean in zip(points, means, strict=True)]
        series = [Series(list(thin(points)), "faint"), Series(list(thin(smoothed)), "line")]
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


def thin(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """At most _POINTS of the points: means of equally many neighbours."""
    size = -(-len(points) // _POINTS)
    for start in range(0, len(points), size):
        group = points[start : start + size]
        yield sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)
