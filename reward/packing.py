"""Rationales to be scored, in micro-batches of packed rows, and back from edges to scores.

Equation: the `suffix` reward of Hu et al. 2024 (arXiv 2310.04363), section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm.packing import Indices
from reward.request import ScoreItem, Tokens
from reward.row import Columns, ScoredRow

# A row wider than this passes through the model in portions, at most this many columns of copies
# at a time: copies do not see one another, and attention among them is wasted.
ONE_PASS_WIDTH = 512
PORTION = 384


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows that pass through the model side by side, after the distinct contexts that they follow.

    The contexts take one pass, the rows another; in portions, their stems take one and their
    copies as many as they need.
    """

    contexts: tuple[Tokens, ...]
    rows: tuple[ScoredRow, ...]
    context_of_row: tuple[int, ...]
    portion: int | None = None  # columns of copies that a row has in one pass; None: all, at once
    min_passes: int = 2  # passes beyond the last copy are made for the sake of other ranks

    @property
    def num_passes(self) -> int:
        needed = 2
        if self.portion is not None:
            needed += max(-(-row.num_copies // self._copies(row)) for row in self.rows)
        return max(needed, self.min_passes)

    @property
    def peak_tokens(self) -> int:
        """Tokens that are held at a time, padding included."""
        return self._num_tokens(self.portion or 0)

    @property
    def num_tokens(self) -> int:
        """Tokens of all passes, padding included: what they cost."""
        return self._num_tokens((self.portion or 0) * (self.num_passes - 2))

    def passes(self) -> Iterator[list[Columns]]:
        """The columns of each row in each pass after that of the contexts."""
        if self.portion is None:
            yield [row.columns(slice(None), with_stem=True) for row in self.rows]
        else:
            yield [row.columns(slice(0), with_stem=True) for row in self.rows]
        for number in range(self.num_passes - 2):
            yield [
                row.columns(slice(number * size, (number + 1) * size), with_stem=False)
                for row in self.rows
                for size in [self._copies(row)]
            ]

    def _copies(self, row: ScoredRow) -> int:
        """Copies of a row in one pass."""
        return max(1, (self.portion or 0) // max(1, row.copy_width))

    def _num_tokens(self, portions: int) -> int:
        context_width = max(len(context) for context in self.contexts)
        at_once = [row.width if self.portion is None else row.stem.width for row in self.rows]
        row_width = max(at_once) + portions
        return len(self.contexts) * context_width + len(self.rows) * row_width


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemEdges:
    """Where an item finds its log-probabilities among the edges of its row."""

    item: int
    row: int
    tokens: Indices  # [L] edges of z_1 .. z_L
    answers: Indices  # [S] first edge of the copy of Y at each stop state; A consecutive ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All micro-batches of some items. `rows_of_batch` numbers the rows as `edges` do."""

    batches: list[MicroBatch]
    rows_of_batch: list[tuple[int, ...]]
    edges: list[ItemEdges]


def lay_out(items: Sequence[ScoreItem], token_budget: int, num_ranks: int = 1) -> Layout:
    """Lay items out in micro-batches that hold at most `token_budget` tokens at a time.

    A lone row may be larger: by its context and its stem, whose copies pass in portions. Where the
    items are too few to fill `num_ranks` micro-batches, these become smaller, so that every rank
    gets its part.
    """
    rows, edges = _build_rows(items)
    portion = min(PORTION, token_budget)
    if rows and num_ranks > 1:
        heads = {row.context.tobytes(): len(row.context) for row in rows}
        total = sum(heads.values()) + sum(row.width for row in rows)
        # One row more than the even part: else a remainder would cost all ranks another pass.
        slack = max(heads.values()) + max(row.width for row in rows)
        token_budget = min(token_budget, total // num_ranks + slack)
    at_once = min(ONE_PASS_WIDTH, token_budget)
    whole = [n for n, row in enumerate(rows) if row.width <= at_once or not row.copy_width]
    parted = sorted(set(range(len(rows))) - set(whole))
    chosen: list[tuple[int | None, list[int]]]
    chosen = [(None, part) for part in _split(rows, whole, token_budget, portion=None)]
    chosen += [(portion, part) for part in _split(rows, parted, token_budget, portion=portion)]
    return Layout(
        batches=[_micro_batch([rows[n] for n in part], size) for size, part in chosen],
        rows_of_batch=[tuple(part) for _, part in chosen],
        edges=edges,
    )


def _micro_batch(rows: Sequence[ScoredRow], portion: int | None) -> MicroBatch:
    distinct = {row.context.tobytes(): row.context for row in rows}
    slot = {key: index for index, key in enumerate(distinct)}
    return MicroBatch(
        contexts=tuple(distinct.values()),
        rows=tuple(rows),
        context_of_row=tuple(slot[row.context.tobytes()] for row in rows),
        portion=portion,
    )


def _build_rows(items: Sequence[ScoreItem]) -> tuple[list[ScoredRow], list[ItemEdges]]:
    """Rows, those of one context together, and where in them each item's edges are."""
    order = sorted(
        range(len(items)),
        key=lambda i: (
            items[i].context.tobytes(),
            items[i].answer.tobytes(),
            items[i].completion.tobytes(),
        ),
    )
    rows: list[ScoredRow] = []
    edges = []
    for index in order:
        item = items[index]
        if not rows or not rows[-1].takes(item):
            rows.append(ScoredRow(item.context, item.answer))
        tokens, answers = rows[-1].add(item)
        edges.append(ItemEdges(item=index, row=len(rows) - 1, tokens=tokens, answers=answers))
    return rows, edges


def _split(
    rows: Sequence[ScoredRow], members: Sequence[int], token_budget: int, *, portion: int | None
) -> Iterator[list[int]]:
    """Deal rows to micro-batches: those of one context together, then those of similar width."""
    width = {n: rows[n].width if portion is None else rows[n].stem.width + portion for n in members}
    widest: dict[bytes, int] = {}
    for n in members:
        key = rows[n].context.tobytes()
        widest[key] = max(widest.get(key, 0), width[n])
    order = sorted(
        members, key=lambda n: (widest[(key := rows[n].context.tobytes())], key, width[n])
    )
    chosen: list[int] = []
    contexts: set[bytes] = set()
    context_width = row_width = 0
    for number in order:
        context = rows[number].context
        grown = contexts | {context.tobytes()}
        context_width = max(context_width, len(context))
        row_width = max(row_width, width[number])
        if chosen and len(grown) * context_width + (len(chosen) + 1) * row_width > token_budget:
            yield chosen
            chosen, grown = [], {context.tobytes()}
            context_width, row_width = len(context), width[number]
        chosen.append(number)
        contexts = grown
    if chosen:
        yield chosen


def gather_scores(
    items: Sequence[ScoreItem], layout: Layout, log_probs: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Log-rewards [S] of each item from the log-probabilities of all edges of each micro-batch.

    `log_probs` holds one array per micro-batch, its rows' edges one after another.
    """
    of_row: dict[int, NDArray[np.float32]] = {}
    for batch, numbers, values in zip(layout.batches, layout.rows_of_batch, log_probs, strict=True):
        ends = np.cumsum([row.num_edges for row in batch.rows])[:-1]
        of_row.update(zip(numbers, np.split(values, ends), strict=True))
    scores: list[NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(items)
    for edges in layout.edges:
        item, values = items[edges.item], of_row[edges.row].astype(np.float64)
        prefix = np.concatenate([[0.0], np.cumsum(values[edges.tokens])])
        suffix = values[edges.answers[:, None] + np.arange(len(item.answer))].sum(axis=1)
        scores[edges.item] = (prefix[item.stops] + suffix).astype(np.float32)
    return scores
