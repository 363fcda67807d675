"""Likelihood against diversity: the methods of a comparison that write sentences in one plane."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes

from cluster.experiments.comparison import Summary, Table
from cluster.experiments.findings import style_of
from cluster.experiments.methods import method
from cluster.reports.plots import new_figure

_DIVERSITY = "diversity"
# What says how likely sentences are, by the kind of measurement: a panel each, and its axis.
_LIKELIHOODS = {
    "max_log_likelihood": "log-likelihood of the likeliest, nats",
    "mean_log_likelihood": "mean log-likelihood, nats",
    "log_reward": "mean log reward, nats",
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
    number = len(likelihoods)
    figure, panels = new_figure(4.2 * number + 1.6, 4.2, panels=number, columns=number)
    families: dict[str, Table] = {}
    for title, row in table.items():
        if _DIVERSITY in row:
            families.setdefault(method(title).name, {})[title] = row
    for likelihood, axes in zip(likelihoods, panels, strict=True):
        for family, titles in families.items():
            points = {
                title: (table[title][_DIVERSITY], table[title][likelihood]) for title in titles
            }
            _draw_family(axes, family, points)
        axes.set_xlabel("diversity")
        axes.set_ylabel(_LIKELIHOODS[likelihood])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def _draw_family(axes: Axes, family: str, points: Mapping[str, tuple[Summary, Summary]]) -> None:
    colour, marker = style_of(family)
    if all(diversity.mean == 0 for diversity, _ in points.values()):
        for _, likely in points.values():
            axes.axhline(likely.mean, color=colour, linestyle=":", linewidth=1.2, label=family)
        return
    ordered = sorted(points.values(), key=lambda point: point[1].mean)
    line = [[one.mean for one in ones] for ones in zip(*ordered, strict=True)]
    axes.plot(*line, color=colour, linewidth=1.0, alpha=0.6)
    for number, (title, (diversity, likely)) in enumerate(points.items()):
        read = method(title)
        place = (diversity.mean, likely.mean)
        axes.errorbar(
            *place,
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
            place,
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
