"""Layout of items in micro-batches of packed rows, and back from edges to scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reward.request import ScoreItem, Tokens
from reward.row import Indices, Row, RowBuilder

# Rows grow by further rationales up to this width. Attention within a row is quadratic, so wider
# rows stop paying; a single rationale may be wider.
ROW_WIDTH = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of one forward pass, with the distinct contexts that they follow."""

    contexts: tuple[Tokens, ...]
    rows: tuple[Row, ...]
    context_of_row: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the padded pass: what it costs."""
        context_width = max(len(context) for context in self.contexts)
        row_width = max(row.width for row in self.rows)
        return len(self.contexts) * context_width + len(self.rows) * row_width


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Where an item finds its log-probabilities among the edges of its row."""

    item: int
    row: int
    tokens: Indices  # [L] edges of z_1 .. z_L
    answers: Indices  # [S] first edge of the copy of Y at each stop state; A consecutive ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All micro-batches of some items. `rows_of_batch` numbers the rows as `readings` do."""

    batches: list[MicroBatch]
    rows_of_batch: list[tuple[int, ...]]
    readings: list[Reading]


def plan(items: Sequence[ScoreItem], token_budget: int, num_ranks: int = 1) -> Plan:
    """Lay items out in micro-batches of at most `token_budget` tokens (a lone row may be larger).

    Where the items are too few to fill `num_ranks` micro-batches, these become smaller, so that
    every rank gets its part.
    """
    rows, readings = _build_rows(items)
    if rows and num_ranks > 1:
        heads = {row.context.tobytes(): len(row.context) for row in rows}
        total = sum(heads.values()) + sum(row.width for row in rows)
        # One row more than the even part: else a remainder would cost all ranks another pass.
        slack = max(heads.values()) + max(row.width for row in rows)
        token_budget = min(token_budget, total // num_ranks + slack)
    batches, rows_of_batch = [], []
    for chosen in _split(rows, token_budget):
        distinct = {rows[number].context.tobytes(): number for number in chosen}
        slot = {key: index for index, key in enumerate(distinct)}
        batches.append(
            MicroBatch(
                contexts=tuple(rows[number].context for number in distinct.values()),
                rows=tuple(rows[number] for number in chosen),
                context_of_row=tuple(slot[rows[number].context.tobytes()] for number in chosen),
            )
        )
        rows_of_batch.append(tuple(chosen))
    return Plan(batches=batches, rows_of_batch=rows_of_batch, readings=readings)


def _build_rows(items: Sequence[ScoreItem]) -> tuple[list[Row], list[Reading]]:
    """Rows, those of one context together, and where in them each item's edges are."""
    order = sorted(
        range(len(items)),
        key=lambda i: (
            items[i].context.tobytes(),
            items[i].answer.tobytes(),
            items[i].completion.tobytes(),
        ),
    )
    builders: list[RowBuilder] = []
    readings = []
    for index in order:
        item = items[index]
        if not builders or not builders[-1].takes(item, ROW_WIDTH):
            builders.append(RowBuilder(item.context, item.answer))
        tokens, answers = builders[-1].add(item)
        readings.append(Reading(item=index, row=len(builders) - 1, tokens=tokens, answers=answers))
    return [builder.row for builder in builders], readings


def _split(rows: Sequence[Row], token_budget: int) -> Iterator[list[int]]:
    """Deal rows to micro-batches: those of one context together, then those of similar width."""
    widest: dict[bytes, int] = {}
    for row in rows:
        key = row.context.tobytes()
        widest[key] = max(widest.get(key, 0), row.width)
    order = sorted(
        range(len(rows)),
        key=lambda i: (widest[(key := rows[i].context.tobytes())], key, rows[i].width),
    )
    chosen: list[int] = []
    contexts: set[bytes] = set()
    context_width = row_width = 0
    for number in order:
        row = rows[number]
        grown = contexts | {row.context.tobytes()}
        context_width = max(context_width, len(row.context))
        row_width = max(row_width, row.width)
        if chosen and len(grown) * context_width + (len(chosen) + 1) * row_width > token_budget:
            yield chosen
            chosen, grown = [], {row.context.tobytes()}
            context_width, row_width = len(row.context), row.width
        chosen.append(number)
        contexts = grown
    if chosen:
        yield chosen


def read(
    items: Sequence[ScoreItem], layout: Plan, edges: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Log-rewards [S] of each item from the log-probabilities of all edges of each micro-batch.

    `edges` holds one array per micro-batch, its rows' edges one after another.
    """
    of_row: dict[int, NDArray[np.float32]] = {}
    for batch, numbers, values in zip(layout.batches, layout.rows_of_batch, edges, strict=True):
        ends = np.cumsum([row.num_edges for row in batch.rows])[:-1]
        of_row.update(zip(numbers, np.split(values, ends), strict=True))
    scores: list[NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(items)
    for reading in layout.readings:
        item, values = items[reading.item], of_row[reading.row].astype(np.float64)
        prefix = np.concatenate([[0.0], np.cumsum(values[reading.tokens])])
        suffix = values[reading.answers[:, None] + np.arange(len(item.answer))].sum(axis=1)
        scores[reading.item] = (prefix[item.stops] + suffix).astype(np.float32)
    return scores
