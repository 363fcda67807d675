"""Charts as inline SVG: a few marks on a frame with round ticks, coloured by the page's style.

Scaling and ticks are matplotlib's; the marks are written here, since its SVG has styles that the
page's policy forbids and takes too long for a page that refreshes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import itemgetter
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxTransform
from numpy.typing import ArrayLike, NDArray

from cluster.reports.html_page import visible

Mark = Literal["line", "faint", "dots", "bars"]
_WIDTH, _HEIGHT = 460.0, 150.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, _WIDTH - 10.0, 6.0, _HEIGHT - 22.0  # of the frame
_BAR_SHARE = 0.6
_HEADROOM = 0.06  # share of the height above and below the marks
_DOT_RADIUS = 3.0

Place = Callable[[ArrayLike], NDArray[np.float64]]  # points (x, y) -> where they stand


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) drawn one way: a line, a faint one, joined dots, or bars from zero."""

    points: Sequence[tuple[float, float]]
    kind: Mark = "line"
    notes: Sequence[str] = ()  # of the points, shown where one is hovered


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A frame and what is in it."""

    title: str  # for those who do not see it
    series: Sequence[Series]
    level: float | None = None  # a dashed line at this height
    bands: Sequence[tuple[float, float]] = ()  # stretches of x that are shaded
    counted: int | None = None  # x counts something, from 0 up to this

    def svg(self) -> Markup:
        """The chart, for the middle of a page; raises ValueError where there is not one point."""
        box = self._data_box()
        # SVG counts y downwards.
        place = BboxTransform(box, Bbox.from_extents(_LEFT, _BOTTOM, _RIGHT, _TOP)).transform
        size = f"0 0 {_WIDTH:g} {_HEIGHT:g}"
        root = Element("svg", {"viewBox": size, "role": "img", "aria-label": visible(self.title)})
        for start, end in self.bands:
            _rectangle(root, "band", *place([(start, box.y0), (end, box.y1)]))
        for value in ticks(box.y0, box.y1, at_most=5):
            (_, y) = place((box.x0, value))
            _line(root, "grid", [(_LEFT, y), (_RIGHT, y)])
            _text(root, "end", _LEFT - 6, y + 3.5, value)
        for value in ticks(box.x0, box.x1, at_most=8, whole=self.counted is not None):
            _text(root, "middle", place((value, box.y0))[0], _HEIGHT - 5, value)
        if self.level is not None:
            _line(root, "level", place([(box.x0, self.level), (box.x1, self.level)]))
        for series in self.series:
            _draw(root, series, place)
        return Markup(tostring(root, encoding="unicode"))

    def _data_box(self) -> Bbox:
        points = [point for series in self.series for point in series.points]
        if not points:
            raise ValueError(f"chart {self.title!r} has no points")
        xs, ys = (list(values) for values in zip(*points, strict=True))
        if self.level is not None:
            ys.append(self.level)
        if any(series.kind == "bars" for series in self.series):
            ys.append(0.0)
        # Bars at both ends need half their width.
        ends = (min(xs), max(xs)) if self.counted is None else (-0.5, max(1, self.counted) + 0.5)
        (x0, x1), (y0, y1) = _apart(*ends), _apart(min(ys), max(ys))
        room = _HEADROOM * (y1 - y0)
        return Bbox.from_extents(x0, y0 - room, x1, y1 + room)


def _draw(root: Element, series: Series, place: Place) -> None:
    """The points of a series, as its kind has them."""
    if series.kind != "bars":
        _line(root, series.kind, place(series.points))
    if series.kind in ("line", "faint"):
        return
    for (x, y), note in zip_longest(series.points, series.notes):
        if series.kind == "bars":
            corners = place([(x - _BAR_SHARE / 2, y), (x + _BAR_SHARE / 2, 0.0)])
            mark = _rectangle(root, "bar below" if y < 0 else "bar above", *corners)
        else:
            cx, cy = place((x, y))
            mark = _mark(root, "circle", "dot", cx=cx, cy=cy, r=_DOT_RADIUS)
        if note:
            SubElement(mark, "title").text = visible(note)


def _mark(root: Element, tag: str, kind: str, **numbers: float) -> Element:
    places = {name: f"{value:.1f}" for name, value in numbers.items()}
    return SubElement(root, tag, {"class": kind, **places})


def _line(root: Element, kind: str, points: ArrayLike) -> None:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in np.asarray(points))
    SubElement(root, "polyline", {"class": kind, "points": places})


def _rectangle(
    root: Element, kind: str, corner: NDArray[np.float64], opposite: NDArray[np.float64]
) -> Element:
    (x, y), (width, height) = np.minimum(corner, opposite), np.abs(corner - opposite)
    return _mark(root, "rect", kind, x=x, y=y, width=width, height=max(height, 0.8))


def _text(root: Element, kind: str, x: float, y: float, value: float) -> None:
    _mark(root, "text", kind, x=x, y=y).text = number(value)


def _apart(low: float, high: float) -> tuple[float, float]:
    """The two, or values around them where they are one."""
    room = 0.0 if high > low else 0.1 * abs(low) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, *, at_most: int, whole: bool = False) -> list[float]:
    """About `at_most` round values between two others: steps are 1, 2 or 5 times a power of ten."""
    locator = MaxNLocator(at_most, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)
    slack = 1e-9 * (high - low)
    values = (float(value) for value in locator.tick_values(low, high))
    within = (value for value in values if low - slack <= value <= high + slack)
    # A sum of steps may miss zero by a rounding error.
    return [value if abs(value) > slack else 0.0 for value in within]


def number(value: float) -> str:
    """A value as short as it can be read."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def outermost(
    points: Sequence[tuple[float, float]], *, at_most: int
) -> Iterator[tuple[float, float]]:
    """All points, or of equally many neighbours the lowest and the highest."""
    if len(points) <= at_most:
        yield from points
        return
    size = -(-2 * len(points) // at_most)
    for start in range(0, len(points), size):
        group = points[start : start + size]
        yield from sorted({min(group, key=itemgetter(1)), max(group, key=itemgetter(1))})
