"""What a run leaves for people: plots, a report, and the table before/after."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from cluster.config.file import resolved_toml
from cluster.config.schema import RunConfig
from cluster.reports.html_page import write_report
from cluster.reports.plots import draw_before_after, draw_curves
from cluster.reports.score_table import pairs, table
from cluster.run.directory import RunDirectory
from cluster.run.display import ELAPSED_S, duration
from cluster.run.metrics_log import read_metrics
from tasks.evaluation.evaluation import Evaluation, Scores


def conclude(config: RunConfig, directory: RunDirectory, scores: Scores) -> None:
    """Draw and write what came of the run."""
    recorded = read_metrics(directory.metrics_file)
    plots = draw_curves(recorded, directory.plots)
    before, after = (_charted(known) for known in (scores.before, scores.after))
    if scores.after is not None and before and after:
        bars = draw_before_after(
            before,
            after,
            directory.plots / "accuracy.png",
            axis="right on test items, %",
            groups=scores.after.groups,
        )
        plots = [bars, *plots]
    write_report(
        directory.report_file,
        scores,
        title=directory.name,
        facts=facts(recorded, scores),
        config=resolved_toml(config),
        plots=plots,
    )


def show_conclusion(directory: RunDirectory, scores: Scores) -> None:
    """Print what came of the run, each question with what was written before and after."""
    console = Console()
    console.print(table(scores.before, scores.after))
    for old, new in pairs(scores.before, scores.after):
        if new is None:
            continue
        console.print(Text(f"\n{new.question} ({new.truth})", style="bold"))
        for label, example in [*([("before", old)] if old else []), ("after", new)]:
            told = f"{example.rationale} -> {example.answer or 'no answer'}"
            verdict = "  (wrong)" if example.right is False else ""
            console.print(Text(f"  {label:<7}{told}{verdict}"))
    console.print(Text(f"report: {directory.report_file}\nadapter: {directory.adapter}"))
    state = directory.state()
    if state is not None and state.step < state.steps:
        console.print(Text(f"{state.phase}: {state.message}"))


def _charted(known: Evaluation | None) -> dict[str, float]:
    """Group -> share, of the metrics that are drawn as bars."""
    metrics = () if known is None else known.metrics.values()
    return {m.group: m.value for m in metrics if m.shown == "chart" and m.value is not None}


def facts(recorded: Sequence[Mapping[str, float]], scores: Scores) -> dict[str, str]:
    """A few figures for the head of the report, and how much of the time evaluation took."""
    if not recorded:
        return {}
    last = recorded[-1]
    trained_s = last[ELAPSED_S]
    found = {"steps": f"{last['step']:.0f}", "training": duration(trained_s)}
    known = (one for one in (scores.before, scores.after) if one is not None)
    if evaluated_s := sum(one.seconds or 0.0 for one in known):
        share = evaluated_s / (evaluated_s + trained_s)
        found["evaluation"] = f"{duration(evaluated_s)}, {share:.0%} of all"
    trajectories = sum(row["batch/trajectories"] for row in recorded)
    found["trajectories learned from"] = f"{trajectories:.0f}"
    return found | {"policy version": f"{last['policy/version']:.0f}"}
