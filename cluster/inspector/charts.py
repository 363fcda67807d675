"""Charts as inline SVG: a few marks on a frame with round ticks, coloured by the page's style.

Scaling and ticks are matplotlib's; the marks are those of templates/chart.svg, since its own SVG
has styles that the page's policy forbids and takes too long for a page that refreshes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import itemgetter
from typing import Literal

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxTransform

from cluster.reports.html_page import page_environment

Mark = Literal["line", "faint", "dots", "bars"]
Point = tuple[float, float]
_FRAME = Bbox.from_extents(46.0, 128.0, 450.0, 6.0)  # SVG counts y downwards
_BAR_SHARE = 0.6
_HEADROOM = 0.06  # share of the height above and below the marks


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) drawn one way: a line, a faint one, joined dots, or bars from zero."""

    points: Sequence[Point]
    kind: Mark = "line"
    notes: Sequence[str] = ()  # of the points, shown where one is hovered

    @property
    def noted(self) -> Iterator[tuple[Point, str | None]]:
        """Each point with its note."""
        return zip_longest(self.points, self.notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A frame and what is in it."""

    title: str  # for those who do not see it
    series: Sequence[Series]
    level: float | None = None  # a dashed line at this height
    bands: Sequence[Point] = ()  # stretches of x that are shaded
    counted: int | None = None  # x counts something, from 0 up to this

    def svg(self) -> Markup:
        """The chart, for the middle of a page; raises ValueError where there is not one point."""
        box = self._data_box()
        place = BboxTransform(box, _FRAME).transform
        drawn = _TEMPLATE.render(
            chart=self,
            box=box,
            frame=_FRAME,
            bar=_BAR_SHARE,
            place=place,
            path=lambda points: Markup(" ".join(f"{x:.1f},{y:.1f}" for x, y in place(points))),
            heights=ticks(box.y0, box.y1, at_most=5),
            widths=ticks(box.x0, box.x1, at_most=8, whole=self.counted is not None),
        )
        return Markup(drawn)

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


def _apart(low: float, high: float) -> Point:
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


def outermost(points: Sequence[Point], *, at_most: int) -> Iterator[Point]:
    """All points, or of equally many neighbours the lowest and the highest."""
    if len(points) <= at_most:
        yield from points
        return
    size = -(-len(points) // (at_most // 2))
    for start in range(0, len(points), size):
        group = points[start : start + size]
        yield from sorted({min(group, key=itemgetter(1)), max(group, key=itemgetter(1))})


_ENVIRONMENT = page_environment("cluster.inspector")
_ENVIRONMENT.filters["number"] = number
_TEMPLATE = _ENVIRONMENT.get_template("chart.svg")
