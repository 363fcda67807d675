"""The table of a run: what was measured before training and after it."""

from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from tasks.evaluation.evaluation import Evaluation


class Row(NamedTuple):
    """One line, ready to print; an empty text where something was not measured."""

    label: str
    items: str
    before: str
    after: str
    gained: bool


def rows(before: Evaluation | None, after: Evaluation | None) -> list[Row]:
    """Every metric that either evaluation shows in tables."""
    found = []
    names = [name for known in (after, before) if known is not None for name in known.metrics]
    for name in dict.fromkeys(names):
        old, new = (one.metrics.get(name) if one else None for one in (before, after))
        known = after if after is not None and new is not None else before
        assert known is not None, name
        metric = known.metrics[name]
        if metric.shown == "comparison":
            continue
        values = [None if one is None else one.value for one in (old, new)]
        found.append(
            Row(
                label=known.label(name),
                items=metric.sample_size,
                before="" if values[0] is None else f"{values[0]:{metric.format}}",
                after="" if values[1] is None else f"{values[1]:{metric.format}}",
                gained=_gained(values[0], values[1], metric.better),
            )
        )
    return found


def table(before: Evaluation | None, after: Evaluation | None) -> Table:
    """The rows for a terminal; without `before` a single column of values."""
    titles = ("items", "before", after_title(after)) if before is not None else ("items", "")
    drawn = Table(box=None)
    if before is not None:
        drawn.title, drawn.title_justify = "before training and after it", "left"
    drawn.add_column("")
    for title in titles:
        drawn.add_column(title, justify="right")
    for row in rows(before, after):
        old = (row.before,) if before is not None else ()
        drawn.add_row(escape(row.label), row.items, *old, f"[bold]{row.after}[/bold]")
    return drawn


def after_title(after: Evaluation | None) -> str:
    """What is said above the figures of the policy: the step that they belong to."""
    return "after" if after is None or after.step is None else f"after step {after.step}"


def _gained(old: float | None, new: float | None, better: str | None) -> bool:
    if old is None or new is None or better is None:
        return False
    return new > old if better == "higher" else new < old
