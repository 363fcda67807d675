"""A packed row: rationales as a prefix tree, and a copy of Y after each of their stop states.

    x_P  z_1 .. z_n      y_1..y_{A-1} @s0  y_1..y_{A-1} @s1 ..
    the stem             its copies: one of Y for each stop state

The copy at s sees the cached context x_1..x_{P-1}, the stem to z_s and itself, at positions that
follow z_s. The last token of Y is only predicted, never read. Rationales of one context and answer
share a row. No copy sees another: a row may pass through the model at once, or its stem first and
the copies in portions after it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm.packing import SHARED_WIDTH, Indices, TokenTree
from reward.request import ScoreItem, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Part of a row that passes through the model together: Q columns."""

    tokens: list[int]
    positions: list[int]
    sees_QK: NDArray[np.bool_]  # K: the stem, and the copies among the Q
    edges: Indices  # [E] numbers, in the row, of what is predicted here
    sources: Indices  # [E] from which of the Q columns


class ScoredRow:
    """A packed row. An edge is one prediction: a source column and the token predicted there.

    Grows by rationales in lexicographic order: each shares most with the last one.
    """

    def __init__(self, context: Tokens, answer: Tokens, *, shared: int) -> None:
        self.context = context  # [P] x_1 .. x_P
        self.head = context[: min(shared, len(context) - 1)]  # what other rows begin with too
        self.stem = TokenTree(first_position=len(context) - 1)
        self.stem.add(context[-1:])
        self.copy_width = len(answer) - 1
        self.targets: list[Tokens] = []
        self.num_edges = 0
        self._answer = answer
        self._parents: list[int] = []  # of each copy: the column of the stem that it follows
        # Of edges: a column of the stem, or ~c for column c of the copies, counted by themselves.
        self._sources: list[Indices] = []
        self._edges: Indices = np.zeros(0, dtype=np.int64)  # of the newest rationale's tokens
        self._copy_of_state: Indices = np.full(1, -1)  # first edge of the copy at each state, or -1

    @property
    def num_copies(self) -> int:
        return len(self._parents)

    @property
    def width(self) -> int:
        """All columns."""
        return self.stem.width + self.num_copies * self.copy_width

    def takes(self, item: ScoreItem) -> bool:
        """Whether the item has the row's context and answer, and fits even if it shares no copy."""
        ours = ((item.context, self.context), (item.answer, self._answer))
        if not all(np.array_equal(*pair) for pair in ours):
            return False
        grown = self.stem.width_with(_after_context(item)) - self.stem.width
        return self.width + grown + len(item.stops) * self.copy_width <= SHARED_WIDTH

    def add(self, item: ScoreItem) -> tuple[Indices, Indices]:
        """Add a rationale; the edges of its tokens [L] and the first of each copy of Y [S]."""
        held = self.stem.width
        path = self.stem.add(_after_context(item))
        shared = int((path < held).sum()) - 1  # tokens of Z
        tail = item.completion[shared:]
        self._copy_of_state = np.append(self._copy_of_state[: shared + 1], np.full(len(tail), -1))
        self._edges = np.append(self._edges[:shared], self._predict(path[shared:-1], tail))
        new_K = item.stops[self._copy_of_state[item.stops] < 0]
        first = self.num_copies * self.copy_width
        column_KN = np.arange(len(new_K) * self.copy_width).reshape(len(new_K), self.copy_width)
        self._parents.extend(path[new_K].tolist())
        source_KA = np.concatenate([path[new_K, None], ~(first + column_KN)], axis=1)
        edges = self._predict(source_KA.ravel(), np.tile(self._answer, len(new_K)))
        self._copy_of_state[new_K] = edges[:: len(self._answer)]
        return self._edges, self._copy_of_state[item.stops]

    def columns(self, copies: slice, *, with_stem: bool) -> Columns:
        """The stem, if asked for, and these copies after it."""
        stem, parents, width = self.stem, self._parents[copies], self.copy_width
        before = stem.width if with_stem else 0
        column_KN = np.arange(len(parents) * width).reshape(len(parents), width)
        stem_TT = stem.sees()
        sees_QK = np.zeros((before + column_KN.size, stem.width + column_KN.size), dtype=bool)
        sees_QK[:before, : stem.width] = stem_TT[:before]
        sees_QK[before:, : stem.width] = np.repeat(stem_TT[parents], width, axis=0)
        rows_KN1, columns_K1N = before + column_KN[:, :, None], stem.width + column_KN[:, None]
        sees_QK[rows_KN1, columns_K1N] = np.tri(width, dtype=bool)

        sources = np.concatenate(self._sources)
        first, _, _ = copies.indices(self.num_copies)
        place = np.where(sources < 0, before + ~sources - first * width, sources)
        here = (place >= before) & (place < len(sees_QK)) & (sources < 0)
        if with_stem:
            here |= sources >= 0
        edges = np.flatnonzero(here)
        starts = [stem.positions[parent] + 1 for parent in parents]
        positions = [start + place for start in starts for place in range(width)]
        return Columns(
            tokens=stem.tokens[:before] + self._answer[:-1].tolist() * len(parents),
            positions=stem.positions[:before] + positions,
            sees_QK=sees_QK,
            edges=edges,
            sources=place[edges],
        )

    def _predict(self, sources: Indices, targets: Tokens) -> Indices:
        """Numbers of the new edges."""
        self._sources.append(sources)
        self.targets.append(targets)
        self.num_edges += len(sources)
        return np.arange(self.num_edges - len(sources), self.num_edges)


def _after_context(item: ScoreItem) -> Tokens:
    """[L + 1] what a row holds of the item beside its copies: x_P z_1 .. z_L."""
    return np.append(item.context[-1:], item.completion)
