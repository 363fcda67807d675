"""Tables for a terminal: any, and that of a run, measured before training and after it."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from tasks.evaluation.evaluation import Evaluation, Example

_SIGNS = {"higher": 1, "lower": -1, None: 0}


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
    known = [one for one in (after, before) if one is not None]
    for name in dict.fromkeys(name for one in known for name in one.metrics):
        owner = next(one for one in known if name in one.metrics)
        metric = owner.metrics[name]
        if metric.shown == "comparison":
            continue
        old, new = (None if one is None else one.value(name) for one in (before, after))
        gain = 0.0 if old is None or new is None else _SIGNS[metric.better] * (new - old)
        texts = ["" if value is None else f"{value:{metric.format}}" for value in (old, new)]
        found.append(Row(owner.label(name), metric.sample_size, texts[0], texts[1], gain > 0))
    return found


def table(before: Evaluation | None, after: Evaluation | None) -> Table:
    """The rows for a terminal; without `before` a single column of values."""
    told = escape(note(before, after))
    drawn = Table(box=None, title_justify="left", caption=told, caption_justify="left")
    if before is not None:
        drawn.title = "before training and after it"
    drawn.add_column("")
    for title in ("items", "before", after_title(after)) if before is not None else ("items", ""):
        drawn.add_column(title, justify="right")
    for row in rows(before, after):
        old = (row.before,) if before is not None else ()
        drawn.add_row(escape(row.label), row.items, *old, f"[bold]{row.after}[/bold]")
    return drawn


def pairs(
    before: Evaluation | None, after: Evaluation | None
) -> list[tuple[Example | None, Example | None]]:
    """What was written for the same prompts, before training and after it."""
    olds, news = (
        {} if one is None else {example.question: example for example in one.examples}
        for one in (before, after)
    )
    return [(olds.get(question), news.get(question)) for question in dict.fromkeys([*news, *olds])]


def note(before: Evaluation | None, after: Evaluation | None) -> str:
    """What must be known beside the figures; empty for nothing."""
    return next((known.note for known in (after, before) if known is not None), "")


def after_title(after: Evaluation | None) -> str:
    """Heading of the policy's figures, with the step that they belong to."""
    return "after" if after is None or after.step is None else f"after step {after.step}"


class Grid(NamedTuple):
    """A table of texts, of which all but those of the first column stand on the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def drawn(self) -> Table:
        """For a terminal."""
        drawn = Table(title=escape(self.title), title_justify="left", box=None)
        for number, word in enumerate(self.header):
            drawn.add_column(escape(word), justify="right" if number else "left")
        for row in self.rows:
            drawn.add_row(*map(escape, row))
        return drawn

    def markdown(self) -> str:
        """Its texts as they are; without the title."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
