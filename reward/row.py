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

    def __init__(self, context: Tokens, answer: Tokens) -> None:
        self.context = context  # [P] x_1 .. x_P
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
        shared = self.stem.shared_length(_after_context(item)) - 1  # tokens of Z
        path = self.stem.add(_after_context(item))
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
        stem, parents = self.stem, self._parents[copies]
        first, _, _ = copies.indices(self.num_copies)
        positions = [
            stem.positions[parent] + 1 + place
            for parent in parents
            for place in range(self.copy_width)
        ]
        before = stem.width if with_stem else 0
        sources = np.concatenate(self._sources)
        place = np.where(sources < 0, before + ~sources - first * self.copy_width, sources)
        here = (place >= before) & (place < before + len(positions)) & (sources < 0)
        if with_stem:
            here |= sources >= 0
        edges = np.flatnonzero(here)
        tokens = self._answer[:-1].tolist() * len(parents)
        return Columns(
            tokens=stem.tokens + tokens if with_stem else tokens,
            positions=stem.positions + positions if with_stem else positions,
            sees_QK=self._sees(parents)[0 if with_stem else stem.width :],
            edges=edges,
            sources=place[edges],
        )

    def _sees(self, parents: list[int]) -> NDArray[np.bool_]:
        """Whether a column of the stem or of a copy after one of `parents` sees another."""
        stem_TT, width = self.stem.sees(), self.copy_width
        own_CC = np.kron(np.eye(len(parents), dtype=bool), np.tri(width, dtype=bool))
        past_CT = np.repeat(stem_TT[parents], width, axis=0)
        future_TC = np.zeros((len(stem_TT), len(own_CC)), dtype=bool)
        return np.block([[stem_TT, future_TC], [past_CT, own_CC]])

    def _predict(self, sources: Indices, targets: Tokens) -> Indices:
        """Numbers of the new edges."""
        self._sources.append(sources)
        self.targets.append(targets)
        self.num_edges += len(sources)
        return np.arange(self.num_edges - len(sources), self.num_edges)


def _after_context(item: ScoreItem) -> Tokens:
    """[L + 1] what a row holds of the item beside its copies: x_P z_1 .. z_L."""
    return np.append(item.context[-1:], item.completion)
