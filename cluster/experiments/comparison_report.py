"""A comparison for people: tables for the terminal, a figure, one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table as RichTable

from cluster.experiments.comparison import Summary, Table
from cluster.reports.html_page import write_html

_COLUMNS = 3  # of panels in the figure
_MOST_PANELS = 9
_COLOURS = {"base": "#b8bcc2", "sft": "#8fb58a", "ppo": "#d9a15b", "gflownet": "#1f5a96"}
_COLOURS |= {"gflownet_em": "#0b2c4d"}
_OTHER = "#7d6aa5"


def written(one: Summary | None) -> str:
    """Mean and deviation as read: shares and nats to four digits, counts whole."""
    if one is None:
        return ""
    digits = ".0f" if abs(one.mean) >= 1000 else ".4g"
    deviation = "" if one.std is None else f" ± {one.std:{digits if one.std >= 1000 else '.2g'}}"
    return f"{one.mean:{digits}}{deviation}"


def shown_table(table: Table, title: str) -> RichTable:
    """Figures down, methods across."""
    drawn = RichTable(title=title, title_justify="left", box=None)
    drawn.add_column("")
    for method in table:
        drawn.add_column(method, justify="right")
    for name in names_of(table):
        drawn.add_row(escape(name), *(written(row.get(name)) for row in table.values()))
    return drawn


def names_of(table: Table) -> list[str]:
    """All figures of all methods, in order of appearance."""
    return list(dict.fromkeys(name for row in table.values() for name in row))


def draw(table: Table, path: Path) -> Path:
    """A panel for each of the first figures, a bar with its deviation for each method."""
    names = names_of(table)[:_MOST_PANELS]
    rows = -(-len(names) // _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.5 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for panel in grid.flat[len(names) :]:
        panel.set_visible(False)
    for name, axes in zip(names, grid.flat, strict=False):
        methods = [method for method in table if name in table[method]]
        summaries = [table[method][name] for method in methods]
        axes.bar(
            methods,
            [one.mean for one in summaries],
            yerr=[one.std or 0.0 for one in summaries],
            color=[_COLOURS.get(method, _OTHER) for method in methods],
            capsize=3,
        )
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def write_page(
    path: Path, *, title: str, metrics: Table, compute: Table, plots: Sequence[Path], runs: str
) -> None:
    """Write the page; nothing in it is fetched from anywhere.

    Args:
        runs: what the runs are called, for people.
    """
    write_html(
        path,
        "comparison.html",
        title=title,
        measured=_across(metrics),
        plots=plots,
        spent=_across(compute),
        runs=runs,
    )


def _across(table: Table) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The methods, and each figure with its value for every one of them."""
    return list(table), [
        (name, [written(row.get(name)) for row in table.values()]) for name in names_of(table)
    ]
