"""The table of a run: what was right on test data before training and after it."""

from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from cluster.measure import Measurement


class Row(NamedTuple):
    """One line, ready to print; an empty text where something was not measured."""

    label: str
    items: str
    before: str
    after: str
    gained: bool


def rows(before: Measurement | None, after: Measurement | None) -> list[Row]:
    """All items, unseen items and unparsable answers, for each number of operands."""
    known = after or before
    if known is None:
        return []
    found = []
    for group, items in known.items.items():
        for label, column, count in (
            ("all items", "accuracy", items),
            ("unseen items only", "unseen", known.unseen_items[group]),
            ("answers unparsable", "unparsable", items),
        ):
            old, new = _share(before, column, group), _share(after, column, group)
            found.append(
                Row(
                    label=f"{group} operands, {label}",
                    items=str(count),
                    before=_percent(old),
                    after=_percent(new),
                    gained=_gained(column, old, new),
                )
            )
    return found


def table(before: Measurement | None, after: Measurement | None) -> Table:
    """The rows for a terminal."""
    drawn = Table(title="right on test items", title_justify="left", box=None)
    drawn.add_column("")
    for heading in ("items", "before", "after"):
        drawn.add_column(heading, justify="right")
    for row in rows(before, after):
        drawn.add_row(escape(row.label), row.items, row.before, f"[bold]{row.after}[/bold]")
    return drawn


def _share(measured: Measurement | None, column: str, group: str) -> float | None:
    return None if measured is None else getattr(measured, column).get(group)


def _gained(column: str, old: float | None, new: float | None) -> bool:
    return column != "unparsable" and old is not None and new is not None and new > old


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
