"""Pictures of a run, as PNG files. Drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cluster.run import display

_WIDTH_INCHES, _HEIGHT_INCHES = 6.4, 3.2
_DOTS_PER_INCH = 110
_RAW, _SMOOTH, _BEFORE, _AFTER = "#b9c9dc", "#1f5a96", "#b8bcc2", "#1f5a96"
# Long runs are noisy: the drawn average reaches over about this share of the steps.
_SMOOTHING_SHARE = 0.04

# File name, metric, axis.
_CURVES = (
    ("loss", display.LOSS, "loss, nats²"),
    ("reward", display.LOG_REWARD, "log reward, nats"),
    ("correct", display.CORRECT, "right on-policy rationales, share"),
    ("elbo", display.ELBO, "ELBO of log Z, nats"),
    ("iwae_gap", display.IWAE_GAP, "KL(q || p) is at least, nats"),
    ("policy_age", display.POLICY_AGE, "policy age, versions"),
    ("throughput", display.TRAJECTORIES_PER_S, "trajectories per second"),
)


def draw_curves(rows: Sequence[Mapping[str, float]], folder: Path) -> list[Path]:
    """One PNG for each metric that the rows hold; the files, in order of interest."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, key, axis in _CURVES:
        points = [(row["step"], row[key]) for row in rows if key in row and "step" in row]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        figure, [axes] = new_figure(_WIDTH_INCHES, _HEIGHT_INCHES)
        axes.plot(steps, values, color=_RAW, linewidth=1)
        axes.plot(steps, smooth(values), color=_SMOOTH, linewidth=1.8)
        axes.set_xlabel("step")
        axes.set_ylabel(axis)
        if key == display.LOSS and min(values) > 0:
            axes.set_yscale("log")
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1])
    return files


def draw_before_after(
    before: Mapping[str, float], after: Mapping[str, float], path: Path, *, axis: str, groups: str
) -> Path:
    """Bars of two evaluations side by side, one pair of shares for each of the `groups`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, [axes] = new_figure(_WIDTH_INCHES, _HEIGHT_INCHES)
    places = np.arange(len(before))
    for shift, values, colour, name in (
        (-0.2, before, _BEFORE, "before"),
        (0.2, after, _AFTER, "after"),
    ):
        heights = [100 * values.get(label, 0.0) for label in before]
        bars = axes.bar(places + shift, heights, 0.36, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    axes.set_xticks(places, list(before))
    axes.set_xlabel(groups)
    axes.set_ylim(0, 109)
    axes.set_ylabel(axis)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
    return path


def new_figure(
    width_inches: float, height_inches: float, *, panels: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with panels, row by row, in the style of all pictures of a report."""
    # Not pyplot: it keeps every figure alive and looks for a display.
    size = (width_inches, height_inches)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(-(-panels // columns), columns, squeeze=False).ravel().tolist()
    for axes in grid[panels:]:
        axes.set_visible(False)
    for axes in grid[:panels]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, grid[:panels]


def smooth(values: ArrayLike, share: float = _SMOOTHING_SHARE) -> list[float]:
    """Mean of each value and those before it, over so large a share of all."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=np.float64), 0, 0.0))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - max(1, round(share * len(ends))), 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
