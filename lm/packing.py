"""Texts packed into rows: what they begin with in common is read once.

    x_1 .. x_P  z_1 .. z_L  z'_2 .. z'_L'  ..          (z'_1 = z_1)

A row is a tree. Each column sees the columns of its own text up to itself, at the positions that
they have there, so that every text is read as if it stood alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# Tokens of completions that share a row, at most; a single one may be longer. Each looks at all of
# the row's columns, if only to mask them, so wider rows stop paying.
SHARED_WIDTH = 192


class TokenTree:
    """One row in the making. Texts should come in an order in which neighbours begin alike."""

    def __init__(self, first_position: int = 0) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self._first_position = first_position
        self._branches: list[tuple[int, Indices, int]] = []  # first column, parents, tokens of each
        self._newest: NDArray[Any] = np.zeros(0, dtype=np.int64)
        self._path: Indices = np.zeros(0, dtype=np.int64)  # columns of the newest text

    @property
    def width(self) -> int:
        return len(self.tokens)

    def shared_length(self, text: Sequence[int] | NDArray[Any]) -> int:
        """Tokens at the head of `text` that the text added last has too."""
        size = min(len(text), len(self._newest))
        differs = self._newest[:size] != np.asarray(text)[:size]
        return int(differs.argmax()) if differs.any() else size

    def width_with(self, text: Sequence[int] | NDArray[Any]) -> int:
        """Columns of the row once `text` has been added."""
        return self.width + len(text) - self.shared_length(text)

    def add(self, text: Sequence[int] | NDArray[Any]) -> Indices:
        """Columns [N] of a text's tokens, of which `shared_length` are there already."""
        shared = self.shared_length(text)
        parent = self._path[shared - 1] if shared else -1
        self._newest = np.asarray(text)
        added = self.branch(np.array([parent]), self._newest[shared:])
        self._path = np.concatenate([self._path[:shared], added[0]])
        return self._path

    def branch(self, parent_K: Indices, tokens: Sequence[int] | NDArray[Any]) -> Indices:
        """Append N tokens after each of K columns (-1: after nothing); their columns [K, N]."""
        start, count = self.width, len(tokens)
        self.tokens.extend(np.asarray(tokens).tolist() * len(parent_K))
        for parent in parent_K.tolist():
            first = self.positions[parent] + 1 if parent >= 0 else self._first_position
            self.positions.extend(range(first, first + count))
        if self.width > start:
            self._branches.append((start, parent_K, count))
        return np.arange(start, self.width).reshape(len(parent_K), count)

    def sees(self) -> NDArray[np.bool_]:
        """[W, W] whether a column (first index) sees another (second)."""
        sees_WW = np.zeros((self.width, self.width), dtype=np.bool_)
        for start, parent_K, count in self._branches:
            columns_KN = start + np.arange(len(parent_K) * count).reshape(-1, count)
            if parent_K[0] >= 0:
                sees_WW[columns_KN] = sees_WW[parent_K, None]
            sees_WW[columns_KN[:, :, None], columns_KN[:, None]] = np.tri(count, dtype=np.bool_)
        return sees_WW


def pad(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """[R, W] rows side by side, zeros on the right."""
    table_RW = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for row, values in zip(table_RW, rows, strict=True):
        row[: len(values)] = values
    return table_RW


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Packing:
    """R rows of W columns, right-padded, for B completions of at most S - 1 tokens."""

    trees: tuple[TokenTree, ...]  # R
    row_B: Indices
    column_BS: Indices  # whose output is state t: after t tokens; beyond L as at L

    @property
    def width(self) -> int:
        return max(tree.width for tree in self.trees)

    @property
    def ids_RW(self) -> NDArray[np.int64]:
        return pad([tree.tokens for tree in self.trees])

    @property
    def position_RW(self) -> NDArray[np.int64]:
        return pad([tree.positions for tree in self.trees])

    @property
    def shared(self) -> bool:
        """Whether some row holds more than one completion; else causal attention will do."""
        return len(self.trees) < len(self.row_B)

    def sees_RWW(self) -> NDArray[np.bool_]:
        """Padding sees itself, for a softmax over nothing is NaN."""
        sees_RWW = np.tile(np.eye(self.width, dtype=np.bool_), (len(self.trees), 1, 1))
        for sees_WW, tree in zip(sees_RWW, self.trees, strict=True):
            sees_WW[: tree.width, : tree.width] = tree.sees()
        return sees_RWW


def pack(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, shared_width: int
) -> Packing:
    """Lay B completions out after their prompts, none of these empty; neither is cut.

    A row takes further completions of its prompt up to `shared_width` tokens in all.
    """
    trees: list[TokenTree] = []
    open_row: dict[tuple[int, ...], int] = {}  # prompt -> the row that is being filled
    row_B = np.zeros(len(prompts), dtype=np.int64)
    num_states = 1 + max(len(completion) for completion in completions)
    column_BS = np.zeros((len(prompts), num_states), dtype=np.int64)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        key = tuple(prompt)
        text = (*key, *completion)
        row = open_row.get(key)
        if row is None or trees[row].width_with(text) > len(key) + shared_width:
            row = open_row[key] = len(trees)
            trees.append(TokenTree())
        row_B[b] = row
        column_BS[b, : len(completion) + 1] = trees[row].add(text)[len(key) - 1 :]
        column_BS[b, len(completion) + 1 :] = column_BS[b, len(completion)]
    return Packing(trees=tuple(trees), row_B=row_B, column_BS=column_BS)
