"""Likelihood against diversity: the methods of a comparison that write sentences in one plane."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cluster.experiments.comparison import Summary, Table
from cluster.experiments.methods import method

_DIVERSITY = "diversity"
# What says how likely sentences are, by the kind of measurement: a panel each, and its axis.
_LIKELIHOODS = {
    "max_log_likelihood": "log-likelihood of the likeliest, nats",
    "mean_log_likelihood": "mean log-likelihood, nats",
    "log_reward": "mean log reward, nats",
}
_OTHER = ("#7d6aa5", "o")
# Family of methods -> colour and marker.
_STYLES = {
    "base": ("#7b828b", "o"),
    "sft": ("#5c9a55", "s"),
    "ppo": ("#d98a2b", "P"),
    "gflownet": ("#1f5a96", "D"),
    "sample": ("#7b828b", "x"),
    "tempered": ("#b06a9b", "^"),
    "nucleus": ("#4aa3a2", "v"),
    "greedy": ("#333333", "_"),
    "beam": ("#c2493d", "<"),
    "diverse_beam": ("#8a6d3b", ">"),
}


def likelihoods_of(table: Table) -> list[str]:
    """The figures to draw diversity against; none where nothing like it was measured."""
    measured = {name for row in table.values() for name in row}
    return [name for name in _LIKELIHOODS if {name, _DIVERSITY} <= measured]


def draw_frontier(table: Table, path: Path) -> Path:
    """A panel for each likelihood: a point with deviations for each method, those of one family
    joined by a line.

    What writes one sentence has no diversity, and is a level line. Hollow: several times as many
    sentences were written.
    """
    likelihoods = likelihoods_of(table)
    size = (4.2 * len(likelihoods) + 1.6, 4.2)
    figure = Figure(figsize=size, dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(likelihoods), squeeze=False)[0]
    families: dict[str, list[str]] = {}
    for title, row in table.items():
        if _DIVERSITY in row:
            families.setdefault(method(title).name, []).append(title)
    for likelihood, axes in zip(likelihoods, panels, strict=True):
        for family, titles in families.items():
            points = [(table[title][_DIVERSITY], table[title][likelihood]) for title in titles]
            _draw_family(axes, family, titles, points)
        axes.set_xlabel("diversity")
        axes.set_ylabel(_LIKELIHOODS[likelihood])
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def _draw_family(
    axes: Axes, family: str, titles: list[str], points: list[tuple[Summary, Summary]]
) -> None:
    colour, marker = _STYLES.get(family, _OTHER)
    if all(diversity.mean == 0 for diversity, _ in points):
        for _, likely in points:
            axes.axhline(likely.mean, color=colour, linestyle=":", linewidth=1.2, label=family)
        return
    points_of = dict(zip(titles, points, strict=True))
    ordered = sorted(titles, key=lambda title: points_of[title][1].mean)
    axes.plot(
        [points_of[title][0].mean for title in ordered],
        [points_of[title][1].mean for title in ordered],
        color=colour,
        linewidth=1.0,
        alpha=0.6,
    )
    for number, title in enumerate(ordered):
        diversity, likely = points_of[title]
        read = method(title)
        axes.errorbar(
            diversity.mean,
            likely.mean,
            xerr=diversity.std,
            yerr=likely.std,
            color=colour,
            marker=marker,
            markerfacecolor="white" if read.times > 1 and marker != "x" else colour,
            capsize=2,
            linestyle="none",
            label=None if number else family,
        )
        said = [] if read.temperature is None else [f"T = {read.temperature:g}"]
        said += [f"{read.times}x"] if read.times > 1 else []
        axes.annotate(
            ", ".join(said),
            (diversity.mean, likely.mean),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
