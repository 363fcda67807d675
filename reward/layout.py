"""Layout of packed rows: every prefix of a rationale scored with its answer in one pass.

A row holds, after its cached context x_1..x_{P-1},

    x_P  z_1 .. z_n  y_1..y_{A-1} @s0  y_1..y_{A-1} @s1 ..      (one copy of Y per stop state)

where the copy at s sees the context, z_1..z_s and itself, at the positions that follow z_s. The
last token of Y is only predicted, never read. Rationales of one context and answer share a row as
a prefix tree, so tokens and copies that they have in common are computed once. Equation: the
`suffix` reward of Hu et al. 2024 (arXiv 2310.04363), section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from reward.item import ScoreItem, Tokens

# Rows grow by further rationales up to this width. Attention within a row is quadratic, so wider
# rows stop paying; a single rationale may be wider.
ROW_WIDTH = 192

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What one rationale added to its row."""

    path: Indices  # [L + 1] columns of x_P z_1 .. z_L
    shared: int  # leading columns of `path` that earlier branches already hold
    fresh: Indices  # [K] stop states whose copy of Y this branch added
    copies: Indices  # [K, A - 1] columns of those copies


@dataclass(slots=True, kw_only=True)
class Row:
    """One packed row. An edge is one prediction: a source column and the token asked of it."""

    context: Tokens  # [P] x_1 .. x_P
    tokens: list[Tokens]
    positions: list[Indices]
    sources: list[Indices] = field(default_factory=list)
    targets: list[Tokens] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    width: int = 1  # columns, x_P included
    num_edges: int = 0

    def mask(self) -> NDArray[np.bool_]:
        """[width, width] whether a column (first index) sees another (second)."""
        sees = np.zeros((self.width, self.width), dtype=bool)
        sees[0, 0] = True
        for branch in self.branches:
            path, depth = branch.path, np.arange(len(branch.path))
            added = depth[branch.shared :]
            sees[path[added, None], path] = depth <= added[:, None]
            if not branch.copies.size:
                continue
            num_copies, copy_width = branch.copies.shape
            prefix = np.repeat(depth <= branch.fresh[:, None], copy_width, axis=0)
            sees[branch.copies.reshape(-1, 1), path] = prefix
            own = np.tri(copy_width, dtype=bool)
            sees[branch.copies[:, :, None], branch.copies[:, None, :]] = own
        return sees


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


class RowBuilder:
    """Grows one row by rationales in lexicographic order, so that each shares most with the last."""

    def __init__(self, context: Tokens, answer: Tokens) -> None:
        self.row = Row(
            context=context,
            tokens=[context[-1:]],
            positions=[np.array([len(context) - 1])],
        )
        self._answer = answer
        self._completion = answer[:0]
        self._path = np.zeros(1, dtype=np.int64)
        self._edges = np.zeros(0, dtype=np.int64)
        self._copy_of_state = np.full(1, -1)  # first edge of the copy at each state, or -1

    def growth(self, item: ScoreItem) -> int:
        """Columns that the item would add, at most."""
        added = len(item.completion) - shared_length(self._completion, item.completion)
        return added + len(item.stops) * (len(self._answer) - 1)

    def add(self, item: ScoreItem) -> tuple[Indices, Indices]:
        """Add a rationale; the edges of its tokens [L] and of its copies of Y [S]."""
        row, shared = self.row, shared_length(self._completion, item.completion)
        tail = item.completion[shared:]
        added = np.arange(len(tail))
        self._path = np.concatenate([self._path[: shared + 1], row.width + added])
        self._edges = np.concatenate([self._edges[:shared], row.num_edges + added])
        self._copy_of_state = np.concatenate(
            [self._copy_of_state[: shared + 1], np.full(len(tail), -1)]
        )
        self._completion = item.completion
        self._extend(tail, len(row.context) + shared + added, self._path[shared:-1], tail)
        fresh = item.stops[self._copy_of_state[item.stops] < 0].astype(np.int64)
        copies = self._add_copies(fresh)
        row.branches.append(
            Branch(path=self._path, shared=shared + 1, fresh=fresh, copies=copies)
        )
        return self._edges, self._copy_of_state[item.stops]

    def _add_copies(self, fresh: Indices) -> Indices:
        """Append one copy of Y after each of the given states; their columns [K, A - 1]."""
        row, answer = self.row, self._answer
        num_copies, size = len(fresh), len(answer)
        columns = row.width + np.arange(num_copies * (size - 1)).reshape(num_copies, size - 1)
        self._copy_of_state[fresh] = row.num_edges + size * np.arange(num_copies)
        positions = len(row.context) + fresh[:, None] + np.arange(size - 1)
        sources = np.concatenate([self._path[fresh, None], columns], axis=1)
        read = np.tile(answer[:-1], num_copies)
        self._extend(read, positions.ravel(), sources.ravel(), np.tile(answer, num_copies))
        return columns

    def _extend(self, tokens: Tokens, positions: Indices, sources: Indices, targets: Tokens) -> None:
        self.row.tokens.append(tokens)
        self.row.positions.append(positions)
        self.row.sources.append(sources)
        self.row.targets.append(targets)
        self.row.width += len(tokens)
        self.row.num_edges += len(sources)


def shared_length(left: Tokens, right: Tokens) -> int:
    """Tokens at the head of both."""
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size


def plan(items: Sequence[ScoreItem], token_budget: int) -> Plan:
    """Lay items out in micro-batches of at most `token_budget` tokens, or of one row if it is larger."""
    rows, readings = _build_rows(items)
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
    """Rows in an order that keeps those of one context together, and where each item's edges are."""
    order = sorted(
        range(len(items)),
        key=lambda i: (
            items[i].context.tobytes(),
            items[i].answer.tobytes(),
            items[i].completion.tobytes(),
        ),
    )
    rows: list[Row] = []
    readings = []
    tree: tuple[bytes, bytes] | None = None
    for index in order:
        item = items[index]
        key = (item.context.tobytes(), item.answer.tobytes())
        if key != tree or builder.row.width + builder.growth(item) > ROW_WIDTH:
            tree, builder = key, RowBuilder(item.context, item.answer)
            rows.append(builder.row)
        tokens, answers = builder.add(item)
        readings.append(Reading(item=index, row=len(rows) - 1, tokens=tokens, answers=answers))
    return rows, readings


def _split(rows: Sequence[Row], token_budget: int) -> Iterator[list[int]]:
    """Deal rows to micro-batches: contexts together where possible, rows of similar width together."""
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
