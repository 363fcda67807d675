"""A packed row: every prefix of a rationale scored with its answer in one pass.

A row holds, after its cached context x_1..x_{P-1},

    x_P  z_1 .. z_n  y_1..y_{A-1} @s0  y_1..y_{A-1} @s1 ..      (one copy of Y per stop state)

where the copy at s sees the context, z_1..z_s and itself, at the positions that follow z_s. The
last token of Y is only predicted, never read. Rationales of one context and answer share a row as
a prefix tree, so tokens and copies that they have in common are computed once. Equation: the
`suffix` reward of Hu et al. 2024 (arXiv 2310.04363), section 3.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from reward.request import ScoreItem, Tokens

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
            copy_width = branch.copies.shape[1]
            prefix = np.repeat(depth <= branch.fresh[:, None], copy_width, axis=0)
            sees[branch.copies.reshape(-1, 1), path] = prefix
            own = np.tri(copy_width, dtype=bool)
            sees[branch.copies[:, :, None], branch.copies[:, None, :]] = own
        return sees


class RowBuilder:
    """Grows one row by rationales in lexicographic order: each shares most with the last one."""

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

    def takes(self, item: ScoreItem, max_width: int) -> bool:
        """Whether the item has the row's context and answer, and fits even if it shares no copy."""
        if not np.array_equal(item.context, self.row.context):
            return False
        if not np.array_equal(item.answer, self._answer):
            return False
        added = len(item.completion) - shared_length(self._completion, item.completion)
        return self.row.width + added + len(item.stops) * (len(self._answer) - 1) <= max_width

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
        row.branches.append(Branch(path=self._path, shared=shared + 1, fresh=fresh, copies=copies))
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

    def _extend(
        self, tokens: Tokens, positions: Indices, sources: Indices, targets: Tokens
    ) -> None:
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
