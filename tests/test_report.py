"""What a run leaves to look at: the page, the pictures, the log of metrics, the live view."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from cluster.reports.html_page import escaped, write_report
from cluster.reports.plots import draw_before_after, draw_curves, smooth
from cluster.reports.run_report import facts
from cluster.reports.score_table import rows
from cluster.run.directory import first_state
from cluster.run.display import duration
from cluster.run.metrics_log import MetricsLog, read_metrics
from cluster.run.terminal import Terminal
from tasks.evaluation.evaluation import Evaluation, Example, Metric, Scores

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</code></td></table><iframe src=//evil.example>",
    "</style><style>body{display:none}",
    "<!-- ",
    "]]>",
    "&lt;script&gt;",
    "javascript:alert(1)",
    "\x00\x1b[31m\x08\x7f",
    "\u202egnp.exe\u2066",
    "\ud800",
]


def measurement(
    *, right: bool | None, text: str = "1 + 2 = 3", unseen: float | None = 0.5
) -> Evaluation:
    def metric(label: str, value: float | None, items: int = 40, **changes: Any) -> Metric:
        fields = {"format": ".1%", "better": "higher", "group": "3"} | changes
        return Metric(label=label, value=value, items=items, **fields)

    return Evaluation(
        task=text,
        temperature=1.0,
        groups="operands",
        metrics={
            "3": metric("all items", 0.9 if right else 0.3, shown="chart"),
            "3 unseen": metric("unseen items only", unseen, 20 if unseen is not None else 0),
            "3 unparsable": metric("answers unparsable", 0.05, better="lower"),
            "3 distinct_right": metric("different right ones", 1.5, shown="comparison"),
        },
        examples=(Example(question=text, rationale=text, answer=text, truth=text, right=right),),
    )


def page(tmp_path: Path, text: str, *, right: bool | None = True) -> str:
    path = tmp_path / "report.html"
    write_report(
        path,
        Scores(
            before=measurement(right=False, text=text), after=measurement(right=right, text=text)
        ),
        title=text,
        facts={text: text},
        config=text,
        plots=draw_curves([{"step": 1.0, "loss/value": 2.0}], tmp_path / "plots"),
    )
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element with its attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(sorted(name for name, _ in attrs))))


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_model_writes_becomes_markup(tmp_path: Path, text: str) -> None:
    harmless = Elements(page(tmp_path, "harmless")).found
    assert Elements(page(tmp_path, text)).found == harmless


def test_an_example_that_nobody_can_judge_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    marks = {
        right: [
            page(tmp_path, "run", right=right).count(f'class="{mark}"')
            for mark in ("right", "wrong")
        ]
        for right in (True, False, None)
    }
    assert marks == {True: [1, 1], False: [0, 2], None: [0, 1]}


def test_characters_that_hide_or_turn_text_are_written_out() -> None:
    assert escaped("a\u202eb\x00c") == "a\\u{202e}b\\u{0}c"
    assert escaped("<a href='x'>&") == "&lt;a href=&#x27;x&#x27;&gt;&amp;"
    assert escaped("é 中 ⊤\n") == "é 中 ⊤\n"


def test_the_page_loads_nothing_and_forbids_scripts(tmp_path: Path) -> None:
    text = page(tmp_path, "run")
    assert "default-src 'none'" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in text and "@import" not in text


def test_the_page_shows_both_measurements(tmp_path: Path) -> None:
    text = page(tmp_path, "run")
    assert "30.0%" in text and "90.0%" in text and "unseen items" in text and "unparsable" in text


def test_the_page_of_a_run_that_measured_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, Scores(), title="r", facts={}, config="", plots=[])
    assert "Before and after" not in path.read_text()


def test_the_table_leaves_out_what_was_not_measured() -> None:
    table = rows(None, measurement(right=True, unseen=None))
    assert [(row.items, row.before, row.after) for row in table] == [
        ("40", "", "90.0%"),
        ("0", "", ""),
        ("40", "", "5.0%"),
    ]
    assert rows(None, None) == []
    assert [row.label for row in table] == [
        *(
            "3 operands, all items",
            "3 operands, unseen items only",
            "3 operands, answers unparsable",
        )
    ]


def test_a_gain_is_what_the_metric_calls_better() -> None:
    gains = rows(measurement(right=False), measurement(right=True))
    assert [row.gained for row in gains] == [True, False, False]
    worse = measurement(right=False)
    less = worse.metrics["3 unparsable"].model_copy(update={"value": 0.01})
    assert [row.gained for row in rows(worse, worse.with_metrics({"3 unparsable": less}))] == [
        *(False, False, True)
    ]


def test_the_report_says_the_share_of_time_that_evaluation_took() -> None:
    recorded = [{"step": 3.0, "time/elapsed_s": 90.0, "policy/version": 3.0,
                 "batch/trajectories": 8.0}]  # fmt: skip
    timed = measurement(right=True).model_copy(update={"seconds": 15.0})
    assert facts(recorded, Scores(before=timed, after=timed))["evaluation"] == "30 s, 25% of all"
    assert "evaluation" not in facts(recorded, Scores(before=measurement(right=True)))


def test_curves_are_drawn_for_the_metrics_there_are(tmp_path: Path) -> None:
    recorded = [
        {"step": float(step), "loss/value": 1.0 / step, "reward/log_mean_nats": -step}
        for step in range(1, 60)
    ]
    files = draw_curves(recorded, tmp_path / "plots")
    assert [file.name for file in files] == ["loss.png", "reward.png"]
    assert all(file.read_bytes().startswith(PNG) for file in files)
    assert draw_curves([], tmp_path / "none") == []


def test_bars_are_drawn_before_and_after(tmp_path: Path) -> None:
    path = tmp_path / "p" / "bars.png"
    file = draw_before_after({"3": 0.3}, {"3": 0.9}, path, axis="right, %", groups="operands")
    assert file.read_bytes().startswith(PNG)


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    assert smooth([1.0, 2.0, 3.0, 7.0], share=0.5) == pytest.approx([1.0, 1.5, 2.5, 5.0])
    assert smooth([4.0, 5.0]) == [4.0, 5.0]


def test_metrics_are_appended_and_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    with MetricsLog(path) as log:
        log.write({"step": 1})
        assert read_metrics(path) == [{"step": 1}]  # at once, not at the end
        log.write({"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    with MetricsLog(path) as log:
        log.write({"step": 4})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 4]


def test_a_row_that_a_full_disk_cut_short_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1})
        file: Any = log._file
        log._file = cast("Any", SimpleNamespace(name="f", write=lambda line: file.write(line[:5])))
        with pytest.raises(OSError, match="No space left"):
            log.write({"step": 2})
        log._file = file
        log.write({"step": 2})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_full_disk_is_named_by_the_file_that_it_does_not_take(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log._file.close()
        refused = pytest.raises(OSError, match=r"No space left on device: '/dev/full'")
        with Path("/dev/full").open("wb", buffering=0) as log._file, refused:
            log.write({"step": 1})


def test_metrics_that_are_no_numbers_survive(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"loss": float("inf")})
    assert read_metrics(path) == [{"loss": float("inf")}]


def test_without_a_terminal_lines_come_now_and_then_and_at_each_phase() -> None:
    out = io.StringIO()
    state = first_state("r", steps=9).model_copy(
        update={"metrics": {"loss/value": 0.5}, "desired": {"actors": 2}, "actual": {"actors": 1}}
    )
    with Terminal(console=Console(file=out, width=300), plain_every_s=1000.0) as terminal:
        for step in range(5):
            terminal.show(state.model_copy(update={"step": step}))
        terminal.event("actor 1 died, [bold]replaced[/bold]")
        terminal.show(state.model_copy(update={"phase": "training", "step": 5}))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "starting step 0/9 version 0 | loss 0.5 | actors 1/2"
    assert lines[1].endswith("actor 1 died, [bold]replaced[/bold]")
    assert lines[2].startswith("training step 5/9")


def test_on_a_terminal_the_panel_is_drawn_and_events_stay() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, _environ={"TERM": "xterm"})
    with Terminal(console=console) as terminal:
        terminal.show(first_state("the-run", steps=9).model_copy(update={"step": 3}))
        terminal.event("actor 1 died, replaced")
    text = out.getvalue()
    assert "the-run" in text and "step 3 of 9" in text and "actor 1 died, replaced" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
