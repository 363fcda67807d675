"""The table of a run: what was measured before training and after it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from cluster.evaluation.measurement import (
    Continuations,
    Distance,
    Infills,
    Labels,
    Measurement,
    Votes,
)

# Field of a Distance -> what it is called, how it reads, and whether more of it is better.
_DISTANCES: tuple[tuple[str, str, str, bool], ...] = (
    ("tv", "total variation to the posterior", ".4f", False),
    ("kl_q_p", "KL(policy || posterior), nats", ".5f", False),
    ("kl_p_q", "KL(posterior || policy), nats", ".5f", False),
    ("jsd", "Jensen-Shannon divergence, nats", ".5f", False),
    ("log_z_error", "error of the policy's log Z, nats", ".4f", False),
    ("valid", "valid completions", ".3%", True),
    ("coverage", "posterior mass that the policy covers", ".3%", True),
    ("elbo", "ELBO of log Z, all prompts, nats", ".3f", True),
)
# The same of all sentences, of Infills, of Continuations and of Labels.
_SENTENCES: tuple[tuple[str, str, str, bool], ...] = (
    ("diversity", "diversity", ".3f", True),
    ("self_bleu4", "self-BLEU-4", ".3f", False),
    ("elbo", "ELBO of log Z, nats", ".2f", True),
    ("ess_share", "effective share of samples", ".1%", True),
    ("seen", "of the prompts, trained on too", "d", False),
)
_INFILLS: tuple[tuple[str, str, str, bool], ...] = (
    ("bleu4", "BLEU-4 against the true sentence", ".1%", True),
    ("gleu4", "GLEU-4 against the true sentence", ".1%", True),
    ("exact", "the true sentence itself", ".1%", True),
    ("similarity", "cosine to the true sentence", ".3f", True),
    ("log_reward", "log reward, nats", ".2f", True),
    ("distinct", "different sentences of a story", ".2f", True),
    *_SENTENCES,
)
_CONTINUATIONS: tuple[tuple[str, str, str, bool], ...] = (
    ("max_log_likelihood", "log-likelihood of the likeliest, nats", ".2f", True),
    ("mean_log_likelihood", "log-likelihood of all, nats", ".2f", True),
    *_SENTENCES,
)
_LABELS: tuple[tuple[str, str, str, bool], ...] = (
    ("accuracy", "reviews labelled right", ".1%", True),
    ("single", "... by one reason alone", ".1%", True),
    ("bare", "... without a reason", ".1%", True),
    ("distinct", "different reasons of a review", ".2f", True),
)
# Column of Votes -> what it is called, which column counts its items, whether more is better.
_VOTES = (
    ("accuracy", "all items", "items", True),
    ("unseen", "unseen items only", "unseen_items", True),
    ("unparsable", "answers unparsable", "items", False),
)
_Fields = Mapping[str, Any]  # of a measurement; empty where there is none


class Row(NamedTuple):
    """One line, ready to print; an empty text where something was not measured."""

    label: str
    items: str
    before: str
    after: str
    gained: bool


def rows(before: Measurement | None, after: Measurement | None) -> list[Row]:
    """All that both measurements say; they are of one kind, as the task's are."""
    known = after or before
    if known is None:
        return []
    old, new = ({} if one is None else one.model_dump() for one in (before, after))
    match known:
        case Votes():
            return list(_votes(old, new, known.model_dump()))
        case Distance():
            items = f"{known.enumerated} of {known.prompts}"
            return list(_means(old, new, _DISTANCES, items))
        case Infills():
            return list(_means(old, new, _INFILLS, f"{known.stories} x {known.samples}"))
        case Continuations():
            return list(_means(old, new, _CONTINUATIONS, f"{known.prompts} x {known.samples}"))
        case Labels():
            return list(_means(old, new, _LABELS, f"{known.items} x {known.samples}"))


def table(before: Measurement | None, after: Measurement | None) -> Table:
    """The rows for a terminal."""
    drawn = Table(title="before training and after it", title_justify="left", box=None)
    drawn.add_column("")
    for heading in ("items", "before", "after"):
        drawn.add_column(heading, justify="right")
    for row in rows(before, after):
        drawn.add_row(escape(row.label), row.items, row.before, f"[bold]{row.after}[/bold]")
    return drawn


def _votes(before: _Fields, after: _Fields, known: _Fields) -> Iterator[Row]:
    for group in known["items"]:
        for column, label, counted, more_is_better in _VOTES:
            old, new = (one.get(column, {}).get(group) for one in (before, after))
            items = str(known[counted][group])
            yield _row(f"{group} operands, {label}", items, (old, new), ".1%", more_is_better)


def _means(
    before: _Fields, after: _Fields, fields: Sequence[tuple[str, str, str, bool]], items: str
) -> Iterator[Row]:
    """A row of every field that was measured at all."""
    for field, label, reads, more_is_better in fields:
        values = (before.get(field), after.get(field))
        if values != (None, None):
            yield _row(label, items, values, reads, more_is_better)


def _row(
    label: str,
    items: str,
    values: tuple[float | None, float | None],
    reads: str,
    more_is_better: bool,
) -> Row:
    old, new = values
    return Row(
        label=label,
        items=items,
        before="" if old is None else f"{old:{reads}}",
        after="" if new is None else f"{new:{reads}}",
        gained=old is not None and new is not None and (new > old if more_is_better else new < old),
    )
