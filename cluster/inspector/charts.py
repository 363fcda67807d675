"""Charts as inline SVG: a few marks on a frame with round ticks, coloured by the page's style."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from cluster.reports.escaping import escaped

Mark = Literal["line", "faint", "dots", "bars"]
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 6.0, 22.0
_BAR_SHARE = 0.6
_HEADROOM = 0.06  # share of the height above and below the marks
_DOT_RADIUS = 3.0


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) drawn one way; a note, if there are any, is shown where its point is hovered.

    Kinds: `line`, `faint` (a thin line behind others), `dots` (joined), `bars` (from zero).
    """

    points: Sequence[tuple[float, float]]
    kind: Mark = "line"
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A frame and what is in it.

    Raises ValueError where there is not one point.
    """

    title: str  # for those who do not see it
    series: Sequence[Series]
    width: float = 460.0
    height: float = 150.0
    level: float | None = None  # a dashed line at this height
    bands: Sequence[tuple[float, float]] = ()  # stretches of x that are shaded
    counted: int | None = None  # x counts something, from 0 up to this

    def svg(self) -> Markup:
        """The chart, for the middle of a page."""
        frame = Frame(self)
        parts = [
            *frame.bands(),
            *frame.grid(),
            *frame.level(),
            *(part for series in self.series for part in frame.marks(series)),
        ]
        return Markup(
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img"'
            f' aria-label="{escaped(self.title)}">{"".join(parts)}</svg>'
        )


class Frame:
    """Where values stand in the picture of a chart."""

    def __init__(self, chart: Chart) -> None:
        self._chart = chart
        points = [point for series in chart.series for point in series.points]
        if not points:
            raise ValueError(f"chart {chart.title!r} has no points")
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if chart.level is not None:
            ys.append(chart.level)
        if any(series.kind == "bars" for series in chart.series):
            ys.append(0.0)
        # Bars at both ends need half their width.
        self._x = (
            (min(xs), max(xs)) if chart.counted is None else (-0.5, max(1, chart.counted) + 0.5)
        )
        room = _HEADROOM * (max(ys) - min(ys))
        self._ticks_y = ticks(min(ys), max(ys), at_most=4)
        self._y = (min(min(ys) - room, self._ticks_y[0]), max(max(ys) + room, self._ticks_y[-1]))

    def bands(self) -> Iterator[str]:
        """Shaded stretches."""
        for start, end in self._chart.bands:
            left, right = self._at_x(start), self._at_x(end)
            yield (
                f'<rect class="band" x="{left:.1f}" y="{_TOP:g}" width="{right - left:.1f}"'
                f' height="{self._floor() - _TOP:.1f}"/>'
            )

    def grid(self) -> Iterator[str]:
        """Horizontal lines with their values, and values of x below."""
        right = self._chart.width - _RIGHT
        for value in self._ticks_y:
            y = self._at_y(value)
            yield f'<line class="grid" x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{_LEFT - 6:g}" y="{y + 3.5:.1f}" class="end">{number(value)}</text>'
        low, high = self._x
        least_step = 0.0 if self._chart.counted is None else 1.0
        for value in ticks(low, high, at_most=8, least_step=least_step):
            if low <= value <= high:
                place = f'x="{self._at_x(value):.1f}" y="{self._chart.height - 5:g}"'
                yield f'<text {place} class="middle">{number(value)}</text>'

    def level(self) -> Iterator[str]:
        """The dashed line."""
        if self._chart.level is not None:
            y, right = self._at_y(self._chart.level), self._chart.width - _RIGHT
            yield f'<line class="level" x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'

    def marks(self, series: Series) -> Iterator[str]:
        """The points of a series, as its kind has them."""
        if series.kind != "bars":
            places = " ".join(f"{self._at_x(x):.1f},{self._at_y(y):.1f}" for x, y in series.points)
            yield f'<polyline class="{series.kind}" points="{places}"/>'
        if series.kind not in ("bars", "dots"):
            return
        notes = [*series.notes, *[""] * (len(series.points) - len(series.notes))]
        for (x, y), note in zip(series.points, notes, strict=True):
            title = f"<title>{escaped(note)}</title>" if note else ""
            if series.kind == "dots":
                place = f'cx="{self._at_x(x):.1f}" cy="{self._at_y(y):.1f}"'
                yield f'<circle class="dot" {place} r="{_DOT_RADIUS:g}">{title}</circle>'
            else:
                yield self._bar(x, y, title)

    def _bar(self, x: float, y: float, title: str) -> str:
        width = _BAR_SHARE * (self._at_x(1.0) - self._at_x(0.0))
        top, bottom = sorted((self._at_y(y), self._at_y(0.0)))
        side = "below" if y < 0 else "above"
        return (
            f'<rect class="bar {side}" x="{self._at_x(x) - width / 2:.1f}" y="{top:.1f}"'
            f' width="{width:.1f}" height="{max(bottom - top, 0.8):.1f}">{title}</rect>'
        )

    def _floor(self) -> float:
        return self._chart.height - _BOTTOM

    def _at_x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + _share(value, low, high) * (self._chart.width - _LEFT - _RIGHT)

    def _at_y(self, value: float) -> float:
        low, high = self._y
        return self._floor() - _share(value, low, high) * (self._floor() - _TOP)


def _share(value: float, low: float, high: float) -> float:
    """How far a value lies between two others; in the middle where they are one."""
    return (value - low) / (high - low) if high > low else 0.5


def ticks(low: float, high: float, *, at_most: int, least_step: float = 0.0) -> list[float]:
    """Round values from about `low` to about `high`, one at least.

    Steps are 1, 2 or 5 times a power of ten.
    """
    span = high - low
    if span <= 0:
        return [low]
    powers = itertools.count(math.floor(math.log10(span / at_most)))
    steps = (factor * 10.0**power for power in powers for factor in (1, 2, 5))
    step = next(step for step in steps if span / step <= at_most and step >= least_step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # A span between two round values has none inside: the one below stands for it.
    return [count * step for count in range(first, last + 1)] or [math.floor(low / step) * step]


def number(value: float) -> str:
    """A value as short as it can be read."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
