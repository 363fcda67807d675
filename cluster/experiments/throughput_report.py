"""What `amortize throughput` shows: tables in a terminal, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config.schema import RunConfig
from cluster.experiments.simulation import decode_steps
from cluster.experiments.throughput_records import Comparison, Row
from cluster.reports.plots import new_figure
from cluster.reports.score_table import Grid

_SIZE_INCHES = (8.0, 3.4)
_MEASURED, _IDEAL = "#1f5a96", "#b8bcc2"
_STYLES = ("-", ":")  # of the lines of an engine
# Stages in the order in which a trajectory passes them.
_COLOURS = {
    "sampling": "#1f5a96",
    "scoring": "#c2410c",
    "storing": "#7aa6cf",
    "drawing": "#8a9a5b",
    "learning": "#4d5b2a",
}


def show(
    config: RunConfig,
    rows: Sequence[Row],
    comparison: Comparison,
    *,
    simulated: bool,
    console: Console,
) -> None:
    """A table of rates, one of stages, and the two modes."""
    waits = config.throughput.simulation
    caption, balanced = "with the configured models", ""
    if simulated:
        sampling_s = decode_steps(config) * waits.decode_step_ms / 1e3
        caption = (
            f"model compute simulated: {sampling_s:g} s to sample a batch, "
            f"{waits.score_call_ms:g} ms to score one, {waits.update_ms:g} ms for a step; "
            f"adapter of {waits.adapter_mb:g} MB"
        )
        balanced = f"; sampling, scoring, learning {waits.balanced_ms:g} ms each"
    console.print(f"[bold]{escape(config.task_name)}[/bold]: {caption}")
    console.print(_rates(rows))
    console.print(_stages(rows))
    console.print(
        f"asynchronous over synchronous: [bold]{comparison.async_over_sync:.2f}[/bold] "
        f"({comparison.steps} steps of {comparison.trajectories / comparison.steps:g} trajectories "
        f"with 1 actor: {comparison.asynchronous_s:.2f} s against "
        f"{comparison.synchronous_s:.2f} s{balanced})",
        soft_wrap=True,
    )


def _rates(rows: Sequence[Row]) -> Table:
    header = [
        "engine",
        "actors",
        "replicas",
        "trajectories/s",
        f"interval ({rows[0].interval_coverage:.0%})",
    ]
    header += ["tokens/s", "efficiency", "bottleneck", "overhead a batch"]
    cells = [
        [
            row.engine,
            str(row.actors),
            str(row.reward_replicas),
            f"{row.trajectories_per_s:.2f}",
            f"{row.trajectories_per_s_low:.2f} – {row.trajectories_per_s_high:.2f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.efficiency:.1%}",
            row.bottleneck,
            ""
            if (over := row.overhead) is None
            else f"{over.seconds_per_batch * 1e3:.0f} ms, {over.share:.1%}",
        ]
        for row in rows
    ]
    return Grid("sampled, scored, stored and learned from", header, cells).drawn()


def _stages(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        told = {
            name: f"{s.trajectories_per_s:.0f}, {s.tokens_per_s:.0f} ({s.busy:.0%})"
            for name, s in row.stages.items()
        }
        cells.append(
            [row.engine, str(row.actors), *(told.get(name, "with sampling") for name in _COLOURS)]
        )
    title = "what each stage alone could do: trajectories/s, tokens/s (share of time at work)"
    return Grid(title, ["engine", "actors", *_COLOURS], cells).drawn()


def draw_throughput(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG: the rate against that of n single actors, and how busy each stage is."""
    figure, [rates, stages] = new_figure(*_SIZE_INCHES, panels=2, columns=2)
    for engine, style in zip(dict.fromkeys(row.engine for row in rows), _STYLES, strict=False):
        _draw_engine(rates, stages, [row for row in rows if row.engine == engine], style)
    rates.set_ylabel("trajectories/s")
    rates.set_ylim(bottom=0)
    stages.set_ylabel("time at work, %")
    stages.set_ylim(0, 105)
    for axes in (rates, stages):
        axes.set_xlabel("rollout actors")
        axes.set_xticks(sorted({row.actors for row in rows}))
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_engine(rates: Any, stages: Any, rows: Sequence[Row], style: str) -> None:
    engine, actors = rows[0].engine, [row.actors for row in rows]
    measured = [row.trajectories_per_s for row in rows]
    ideal = [measured[0] * number for number in actors]
    rates.plot(actors, ideal, color=_IDEAL, linestyle="--", label=f"n times one actor, {engine}")
    rates.errorbar(
        actors,
        measured,
        yerr=[
            [row.trajectories_per_s - row.trajectories_per_s_low for row in rows],
            [row.trajectories_per_s_high - row.trajectories_per_s for row in rows],
        ],
        color=_MEASURED,
        linestyle=style,
        marker="o",
        capsize=3,
        label=f"measured, {engine}",
    )
    for name in rows[0].stages:
        busy = [100 * row.stages[name].busy for row in rows]
        label = f"{name}, {engine}"
        stages.plot(actors, busy, marker="o", linestyle=style, color=_COLOURS[name], label=label)
