"""What a run leaves for people: plots, a report, and the table before/after."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from cluster.config.file import resolved_toml
from cluster.config.schema import RunConfig
from cluster.reports.html_page import write_report
from cluster.reports.plots import draw_before_after, draw_curves
from cluster.reports.score_table import table
from cluster.run.directory import RunDirectory
from cluster.run.display import ELAPSED_S, duration
from cluster.run.metrics_log import read_metrics
from tasks.evaluation.evaluation import Evaluation, Example, Scores


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
        run=directory.name,
        facts=facts(recorded, scores),
        config=resolved_toml(config),
        before=scores.before,
        after=scores.after,
        plots=plots,
    )


def show_conclusion(directory: RunDirectory, scores: Scores) -> None:
    """Print what came of the run."""
    console = Console()
    console.print(table(scores.before, scores.after))
    for example in scores.after.examples if scores.after is not None else ():
        show_example(console, scores, example)
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
    trajectories = sum(row["batch/trajectories"] for row in recorded)
    return {
        "steps": f"{last['step']:.0f}",
        "training": duration(trained_s),
        **_evaluation_time(trained_s, scores),
        "trajectories learned from": f"{trajectories:.0f}",
        "policy version": f"{last['policy/version']:.0f}",
    }


def _evaluation_time(trained_s: float, scores: Scores) -> dict[str, str]:
    """Seconds of both evaluations, and their share of these and training together."""
    known = (one.seconds for one in (scores.before, scores.after) if one is not None)
    evaluated_s = sum(seconds for seconds in known if seconds is not None)
    if not evaluated_s:
        return {}
    share = evaluated_s / (evaluated_s + trained_s)
    return {"evaluation": f"{duration(evaluated_s)}, {share:.0%} of all"}


def show_example(console: Console, scores: Scores, after: Example) -> None:
    """One question with what was written before and after."""
    olds = scores.before.examples if scores.before is not None else ()
    console.print(Text(f"\n{after.question} ({after.truth})", style="bold"))
    same = [example for example in olds if example.question == after.question]
    for label, example in [*(("before", one) for one in same), ("after", after)]:
        answer = example.answer or "no answer"
        mark = "" if example.right else "  (wrong)"
        console.print(Text(f"  {label:<7}{example.rationale} -> {answer}{mark}"))
