"""The picture of a throughput experiment."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cluster.experiments.throughput_records import Row

_SIZE_INCHES = (8.0, 3.4)
_DOTS_PER_INCH = 110
_MEASURED, _IDEAL = "#1f5a96", "#b8bcc2"
_COLOURS = {
    "sampling": "#1f5a96",
    "scoring": "#c2410c",
    "storing": "#7aa6cf",
    "drawing": "#8a9a5b",
    "learning": "#4d5b2a",
}


def draw_throughput(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG: the rate against that of n single actors, and how busy each stage is."""
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    rates, stages = figure.subplots(1, 2)
    actors = [row.actors for row in rows]
    median = [row.rate.median for row in rows]
    low = [row.rate.median - row.rate.low for row in rows]
    high = [row.rate.high - row.rate.median for row in rows]
    ideal = [median[0] * number for number in actors]
    rates.plot(actors, ideal, color=_IDEAL, linestyle="--", label="n times one actor")
    rates.errorbar(
        actors, median, yerr=[low, high], color=_MEASURED, marker="o", capsize=3, label="measured"
    )
    rates.set_ylabel("trajectories/s")
    rates.set_ylim(bottom=0)
    for name in dict.fromkeys(stage.name for row in rows for stage in row.stages):
        busy = [100 * next(s.busy for s in row.stages if s.name == name) for row in rows]
        stages.plot(actors, busy, marker="o", color=_COLOURS[name], label=name)
    stages.set_ylabel("time at work, %")
    stages.set_ylim(0, 105)
    for axes in (rates, stages):
        axes.set_xlabel("rollout actors")
        axes.set_xticks(actors)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    FigureCanvasAgg(figure)
    figure.savefig(path)
