"""What the pages are made of: texts cut in the right places, curves and charts as SVG."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.inspector import curves
from cluster.inspector.charts import Chart, Series, number, outermost, ticks
from cluster.inspector.curves import RowsByStep, draw_curves, thin
from cluster.inspector.rows import tool_spans
from cluster.run.metrics_log import rows_in
from lm.spelling import Piece, split_pieces, split_text
from tests.inspector_toy import HOSTILE, TOKENIZER, encode


def parsed(chart: Chart) -> ElementTree.Element:
    """The chart as strict XML; a browser is more patient."""
    return ElementTree.fromstring(chart.svg())


# --- texts


@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_however_a_text_is_cut_its_pieces_are_the_text(text: str, cuts: list[int]) -> None:
    tokens = encode(text)
    ends = sorted({*(cut for cut in cuts if cut < len(tokens)), len(tokens)})
    # A cut inside a character leaves half of it: what is decoded then is not the text's prefix.
    if all(TOKENIZER.decode(tokens).startswith(TOKENIZER.decode(tokens[:end])) for end in ends):
        assert "".join(split_text(tokens, ends, TOKENIZER.decode)) == TOKENIZER.decode(tokens)


def test_pieces_change_where_the_writer_does() -> None:
    written, inserted, more = encode(" 1 + 2 ="), encode(" 3"), encode(", 3 - 1 =")
    from_tool = [False] * len(written) + [True] * len(inserted) + [False] * len(more)
    pieces = split_pieces([*written, *inserted, *more], from_tool, TOKENIZER.decode)
    assert pieces == (Piece(" 1 + 2 =", False), Piece(" 3", True), Piece(", 3 - 1 =", False))
    assert split_pieces([], [], TOKENIZER.decode) == ()
    start = len(written)
    assert tool_spans(from_tool) == [(start, start + len(inserted))]
    assert tool_spans([True, False, True, True]) == [(0, 1), (2, 4)]
    assert tool_spans([]) == []


# --- charts


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-6, 1e6),
    at_most=st.integers(2, 10),
    whole=st.booleans(),
)
def test_ticks_are_round_few_and_within(low: float, span: float, at_most: int, whole: bool) -> None:
    span += 2 * whole  # what is counted goes from -0.5 to 1.5 at least
    high = low + span
    found = ticks(low, high, at_most=at_most, whole=whole)
    assert 1 <= len(found) <= at_most + 1
    if len(found) > 1:
        step = found[1] - found[0]
        assert not whole or step >= 1 - 1e-6
        leading = float(f"{step:.3e}".partition("e")[0])
        assert min(abs(leading - round_) for round_ in (1, 2, 5, 10)) < 1e-2
        # Far from zero no number is nearer to a round one than the spacing of floats there.
        slack = 1e-6 * span + 2 * math.ulp(max(abs(low), abs(high)))
        assert low - slack <= found[0] and found[-1] <= high + slack


def test_a_chart_has_a_mark_for_every_point_and_notes_on_hover() -> None:
    points = [(0, -1.0), (2, 3.0), (5, 0.5)]
    root = parsed(
        Chart(
            title="a chart",
            series=[Series(points, "bars", ["zero", "two", "five"])],
            level=2.0,
            bands=[(1, 2)],
            counted=5,
        )
    )
    kinds = [element.get("class") for element in root]
    assert kinds.count("bar above") == 2 and kinds.count("bar below") == 1
    assert kinds.count("level") == 1 and kinds.count("band") == 1
    assert [e.text for e in root.iter("title")] == ["zero", "two", "five"]
    width = float(root.get("viewBox", "").split()[2])
    for bar in (element for element in root if "bar" in (element.get("class") or "").split()):
        left, size = float(bar.get("x", "nan")), float(bar.get("width", "nan"))
        assert left >= 0 and left + size <= width


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-5e8, 3.0], [1e-9, 2e-9]])
def test_any_values_fit_into_the_picture(values: list[float]) -> None:
    points = list(enumerate(values))
    root = parsed(Chart(title="t", series=[Series(points, "dots")]))
    for circle in (element for element in root if element.get("class") == "dot"):
        assert 0 <= float(circle.get("cx", "nan")) <= 460
        assert 0 <= float(circle.get("cy", "nan")) <= 150


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="'empty' has no points"):
        Chart(title="empty", series=[Series([])]).svg()


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_what_is_written_into_a_chart_stays_text(text: str) -> None:
    root = parsed(Chart(title=text, series=[Series([(0, 1.0)], "dots", [text])]))
    assert root.get("aria-label") == text
    assert [e.text for e in root.iter("title")] == [text]


def test_numbers_are_short() -> None:
    found = [number(value) for value in (0, 12.5, -0.25, 123456.0, 1.25e-9, 9999.0)]
    assert found == ["0", "12.5", "-0.25", "1.23e5", "1.25e-9", "9999"]


# --- curves


def test_the_metrics_are_read_on_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    recorded = RowsByStep(path)
    assert recorded.rows() == []
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
        file.flush()
        assert [row["step"] for row in recorded.rows()] == [1]
        file.write(': 2.0}\nnot json\n[1]\n{"step": 3, "a": "<b>", "c": NaN}\n{"a": 4.0}\n')
        file.flush()
        assert recorded.rows() == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3}]
        # The run was resumed from a checkpoint at step 1.
        file.write('{"step": 2, "a": 20.0}\n')
        file.flush()
        assert [row.get("a") for row in recorded.rows()] == [1.0, 20.0, None]


def test_metrics_that_were_read_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    recorded, read = RowsByStep(path), list[int]()

    def counting(lines: bytes) -> list[dict[str, float]]:
        read.append(len(lines.splitlines()))
        return list(rows_in(lines))

    monkeypatch.setattr(curves, "rows_in", counting)
    lines = [f'{{"step": {step}}}\n' for step in range(1, 6)]
    for length in (3, 3, 5):
        path.write_text("".join(lines[:length]))
        assert [row["step"] for row in recorded.rows()] == [*range(1, length + 1)]
    assert read == [3, 0, 2]
    path.write_text(lines[4])  # shorter: not what was read
    assert [row["step"] for row in recorded.rows()] == [5]


def test_every_metric_has_a_curve_and_the_known_ones_come_first() -> None:
    rows = [
        {"step": float(step), "loss/value": 100.0 / step, "z/other": 1.0, "a/other": 2.0}
        for step in range(1, 1001)
    ]
    drawn = draw_curves(rows)
    assert [curve.key for curve in drawn] == ["loss/value", "a/other", "z/other"]
    assert [curve.is_headline for curve in drawn] == [True, False, False]
    # 100 / step, averaged over the last forty of the thousand steps
    assert drawn[0].last == f"{sum(100.0 / step for step in range(961, 1001)) / 40:.3g}"
    assert len(drawn[0].chart) < 30_000, "long runs are thinned"
    assert draw_curves([]) == []
    json.dumps([str(curve.chart) for curve in drawn])


def test_thinning_keeps_the_mean_and_the_ends_in_sight() -> None:
    points = [(float(x), float(x % 7)) for x in range(4000)]
    found = thin(np.array(points))
    assert len(found) == 400
    assert found[0][0] < 10 and found[-1][0] > 3990
    assert sum(y for _, y in found) / 400 == pytest.approx(sum(y for _, y in points) / 4000)
    assert thin(np.array(points[:3])) == points[:3]


@given(heights=st.lists(st.floats(-10, 10), max_size=300), at_most=st.integers(2, 50))
def test_long_series_keep_their_lowest_and_highest_points(
    heights: list[float], at_most: int
) -> None:
    points = [(float(x), y) for x, y in enumerate(heights)]
    found = list(outermost(points, at_most=at_most))
    assert len(found) <= at_most and found == sorted(found) and set(found) <= set(points)
    assert len(points) > at_most or found == points
    for end in (min, max):
        assert end(y for _, y in [*found, (0, 0)]) == end(y for _, y in [*points, (0, 0)])
