"""Rationales to be scored, in micro-batches of packed rows, and back from edges to scores.

Equation: the `suffix` reward of Hu et al. 2024 (arXiv 2310.04363), section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """Rows that pass through the model side by side, after a pass of their distinct contexts.

    In portions, their stems take one pass and their copies as many as they need.
    """

    rows: tuple[ScoredRow, ...]
    portion: int | None = None  # columns of copies that a row has in one pass; None: all, at once
    min_passes: int = 2  # passes beyond the last copy are made for the sake of other ranks

    @property
    def contexts(self) -> dict[bytes, Tokens]:
        """The distinct ones, by their content."""
        return {row.context.tobytes(): row.context for row in self.rows}

    @property
    def head(self) -> tuple[int, ...]:
        """What all contexts begin with, such as worked questions; () where they do not."""
        heads = {row.head.tobytes(): row.head for row in self.rows}
        return tuple(next(iter(heads.values())).tolist()) if len(heads) == 1 else ()

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
        first = slice(None if self.portion is None else 0)
        yield [row.columns(first, with_stem=True) for row in self.rows]
        for number in range(self.num_passes - 2):
            sizes = [self._copies(row) for row in self.rows]
            yield [
                row.columns(slice(number * size, (number + 1) * size), with_stem=False)
                for row, size in zip(self.rows, sizes, strict=True)
            ]

    def _copies(self, row: ScoredRow) -> int:
        """Copies of a row in one pass."""
        return max(1, (self.portion or 0) // max(1, row.copy_width))

    def _num_tokens(self, portions: int) -> int:
        contexts = self.contexts.values()
        context_width = max(len(context) for context in contexts)
        at_once = [row.width if self.portion is None else row.stem.width for row in self.rows]
        return len(contexts) * context_width + len(self.rows) * (max(at_once) + portions)


class ItemEdges(NamedTuple):
    """Where an item finds its log-probabilities among the edges of its row."""

    row: ScoredRow
    tokens: Indices  # [L] edges of z_1 .. z_L
    answers: Indices  # [S] first edge of the copy of Y at each stop state; A consecutive ones


class Layout(NamedTuple):
    """All micro-batches of some items, and the edges of each item."""

    batches: list[MicroBatch]
    edges: list[ItemEdges]


def lay_out(items: Sequence[ScoreItem], token_budget: int, num_ranks: int = 1) -> Layout:
    """Lay items out in micro-batches that hold at most `token_budget` tokens at a time.

    A lone row may be larger: by its context and its stem, whose copies pass in portions. Where the
    items are few, micro-batches become smaller, so that each of `num_ranks` gets its part.
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
    whole: list[ScoredRow] = []
    parted: list[ScoredRow] = []
    for row in rows:
        (parted if row.width > at_once and row.copy_width else whole).append(row)
    batches = [*_split(whole, token_budget, None), *_split(parted, token_budget, portion)]
    return Layout(batches, edges)


def _build_rows(items: Sequence[ScoreItem]) -> tuple[list[ScoredRow], list[ItemEdges]]:
    """Rows, those of one context together, and where in them each item's edges are."""
    keys = [(i.context.tobytes(), i.answer.tobytes(), i.completion.tobytes()) for i in items]
    rows: list[ScoredRow] = []
    edges: dict[int, ItemEdges] = {}
    for number in sorted(range(len(items)), key=keys.__getitem__):
        item = items[number]
        if not rows or not rows[-1].takes(item):
            rows.append(ScoredRow(item.context, item.answer, shared=item.shared))
        edges[number] = ItemEdges(rows[-1], *rows[-1].add(item))
    return rows, [edges[number] for number in range(len(items))]


def _split(
    rows: Sequence[ScoredRow], token_budget: int, portion: int | None
) -> Iterator[MicroBatch]:
    """Deal rows to micro-batches: those of one context together, then those of similar width."""
    widths = [row.width if portion is None else row.stem.width + portion for row in rows]
    contexts = [row.context.tobytes() for row in rows]
    widest: dict[bytes, int] = {}
    for context, width in zip(contexts, widths, strict=True):
        widest[context] = max(widest.get(context, 0), width)
    order = sorted(range(len(rows)), key=lambda n: (widest[contexts[n]], contexts[n], widths[n]))
    chosen: list[ScoredRow] = []
    seen: set[bytes] = set()
    context_width = row_width = 0
    for n in order:
        seen.add(contexts[n])
        context_width = max(context_width, len(rows[n].context))
        row_width = max(row_width, widths[n])
        if chosen and len(seen) * context_width + (len(chosen) + 1) * row_width > token_budget:
            yield MicroBatch(rows=tuple(chosen), portion=portion)
            chosen, seen = [], {contexts[n]}
            context_width, row_width = len(rows[n].context), widths[n]
        chosen.append(rows[n])
    if chosen:
        yield MicroBatch(rows=tuple(chosen), portion=portion)


def gather_scores(
    items: Sequence[ScoreItem], layout: Layout, log_probs: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Log-rewards [S] of each item from log p of each micro-batch's edges, row after row."""
    of_row: dict[ScoredRow, NDArray[np.float32]] = {}
    for batch, values in zip(layout.batches, log_probs, strict=True):
        ends = np.cumsum([row.num_edges for row in batch.rows])[:-1]
        of_row.update(zip(batch.rows, np.split(values, ends), strict=True))
    scores = []
    for item, edges in zip(items, layout.edges, strict=True):
        values = of_row[edges.row].astype(np.float64)
        prefix = np.concatenate([[0.0], np.cumsum(values[edges.tokens])])
        suffix = values[edges.answers[:, None] + np.arange(len(item.answer))].sum(axis=1)
        scores.append((prefix[item.stops] + suffix).astype(np.float32))
    return scores
