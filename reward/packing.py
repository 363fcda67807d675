"""Every prefix of a rationale scored with its answer in one pass: rows, micro-batches, and back.

A row holds, after its cached context x_1..x_{P-1},

    x_P  z_1 .. z_n  y_1..y_{A-1} @s0  y_1..y_{A-1} @s1 ..      (one copy of Y per stop state)

where the copy at s sees the context, z_1..z_s and itself, at the positions that follow z_s. The
last token of Y is only predicted, never read. Rationales of one context and answer share a row as
a prefix tree, so tokens and copies that they have in common are computed once. Equation: the
`suffix` reward of Hu et al. 2024 (arXiv 2310.04363), section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm.packing import SHARED_WIDTH, Indices, TokenTree
from reward.request import ScoreItem, Tokens


class ScoredRow:
    """A packed row. An edge is one prediction: a source column and the token predicted there.

    Grows by rationales in lexicographic order: each shares most with the last one.
    """

    def __init__(self, context: Tokens, answer: Tokens) -> None:
        self.context = context  # [P] x_1 .. x_P
        self.tree = TokenTree(first_position=len(context) - 1)
        self.sources: list[Indices] = []
        self.targets: list[Tokens] = []
        self.num_edges = 0
        self._answer = answer
        self._edges: Indices = np.zeros(0, dtype=np.int64)  # of the newest rationale's tokens
        self._copy_of_state: Indices = np.full(1, -1)  # first edge of the copy at each state, or -1
        self.tree.add(context[-1:])

    def takes(self, item: ScoreItem) -> bool:
        """Whether the item has the row's context and answer, and fits even if it shares no copy."""
        if not np.array_equal(item.context, self.context):
            return False
        if not np.array_equal(item.answer, self._answer):
            return False
        copies = len(item.stops) * (len(self._answer) - 1)
        return self.tree.width_with(_behind(item)) + copies <= SHARED_WIDTH

    def add(self, item: ScoreItem) -> tuple[Indices, Indices]:
        """Add a rationale; the edges of its tokens [L] and the first of each copy of Y [S]."""
        shared = self.tree.shared_length(_behind(item)) - 1  # tokens of Z
        path = self.tree.add(_behind(item))
        tail = item.completion[shared:]
        self._copy_of_state = np.append(self._copy_of_state[: shared + 1], np.full(len(tail), -1))
        self._edges = np.append(self._edges[:shared], self._predict(path[shared:-1], tail))
        new_K = item.stops[self._copy_of_state[item.stops] < 0]
        copy_KN = self.tree.branch(path[new_K], self._answer[:-1])
        source_KA = np.concatenate([path[new_K, None], copy_KN], axis=1)
        edges = self._predict(source_KA.ravel(), np.tile(self._answer, len(new_K)))
        self._copy_of_state[new_K] = edges[:: len(self._answer)]
        return self._edges, self._copy_of_state[item.stops]

    def _predict(self, sources: Indices, targets: Tokens) -> Indices:
        """Numbers of the new edges."""
        self.sources.append(sources)
        self.targets.append(targets)
        self.num_edges += len(sources)
        return np.arange(self.num_edges - len(sources), self.num_edges)


def _behind(item: ScoreItem) -> Tokens:
    """[L + 1] what a row holds of the item beside its copies: x_P z_1 .. z_L."""
    return np.append(item.context[-1:], item.completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of one forward pass, with the distinct contexts that they follow."""

    contexts: tuple[Tokens, ...]
    rows: tuple[ScoredRow, ...]
    context_of_row: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the padded pass: what it costs."""
        context_width = max(len(context) for context in self.contexts)
        row_width = max(row.tree.width for row in self.rows)
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
    """Lay items out in micro-batches of at most `token_budget` tokens (a lone row may be larger).

    Where the items are too few to fill `num_ranks` micro-batches, these become smaller, so that
    every rank gets its part.
    """
    rows, edges = _build_rows(items)
    if rows and num_ranks > 1:
        heads = {row.context.tobytes(): len(row.context) for row in rows}
        total = sum(heads.values()) + sum(row.tree.width for row in rows)
        # One row more than the even part: else a remainder would cost all ranks another pass.
        slack = max(heads.values()) + max(row.tree.width for row in rows)
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
    return Layout(batches=batches, rows_of_batch=rows_of_batch, edges=edges)


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


def _split(rows: Sequence[ScoredRow], token_budget: int) -> Iterator[list[int]]:
    """Deal rows to micro-batches: those of one context together, then those of similar width."""
    widest: dict[bytes, int] = {}
    for row in rows:
        key = row.context.tobytes()
        widest[key] = max(widest.get(key, 0), row.tree.width)
    order = sorted(
        range(len(rows)),
        key=lambda i: (widest[(key := rows[i].context.tobytes())], key, rows[i].tree.width),
    )
    chosen: list[int] = []
    contexts: set[bytes] = set()
    context_width = row_width = 0
    for number in order:
        row = rows[number]
        grown = contexts | {row.context.tobytes()}
        context_width = max(context_width, len(row.context))
        row_width = max(row_width, row.tree.width)
        if chosen and len(grown) * context_width + (len(chosen) + 1) * row_width > token_budget:
            yield chosen
            chosen, grown = [], {row.context.tobytes()}
            context_width, row_width = len(row.context), row.tree.width
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
