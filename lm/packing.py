"""Completions of one prompt, packed behind a single copy of it.

    x_1 .. x_P  z_1 .. z_L  z'_1 .. z'_L'  ..

Each completion sees the prompt and itself, at the positions that follow the prompt, so that it is
read as if it stood alone. A group of trajectories then costs its prompt once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Tokens of completions that share a row, at most; a single one may be longer. Each looks at all of
# the row's columns, if only to mask them, so wider rows stop paying.
SHARED_WIDTH = 192


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Packing:
    """R rows of W columns, right-padded, for B completions of at most S - 1 tokens."""

    ids_RW: NDArray[np.int64]
    position_RW: NDArray[np.int64]
    part_RW: NDArray[np.int64]  # 0 in the prompt, 1, 2, .. in its completions, -1 in the padding
    row_B: NDArray[np.int64]
    column_BS: NDArray[np.int64]  # whose output is state t: behind t tokens; beyond L as at L

    @property
    def shared(self) -> bool:
        """Whether some row holds more than one completion; else causal attention will do."""
        return len(self.ids_RW) < len(self.row_B)

    @property
    def first(self) -> int:
        """The earliest column that is a state: the last of the shortest prompt."""
        return int(self.column_BS[:, 0].min())

    def sees_RWW(self) -> NDArray[np.bool_]:
        """Whether a column sees another: one before it, in the prompt or in its own completion.

        Padding sees itself, for a softmax over nothing is NaN.
        """
        of, at = self.part_RW[:, :, None], self.part_RW[:, None, :]
        before = np.tri(self.ids_RW.shape[1], dtype=np.bool_)
        return before & ((at == 0) | (of == at))


def pack(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, shared_width: int
) -> Packing:
    """Lay B completions out behind their prompts, none of these empty; neither is cut.

    A row takes further completions of its prompt up to `shared_width` tokens in all.
    """
    rows: list[list[int]] = []  # of row: its completions
    widths: list[int] = []
    open_row: dict[tuple[int, ...], int] = {}  # prompt -> the row that is being filled
    start_B, row_B = np.zeros((2, len(prompts)), dtype=np.int64)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        key = tuple(prompt)
        row = open_row.get(key)
        if row is None or widths[row] + len(completion) > len(key) + shared_width:
            row = open_row[key] = len(rows)
            rows.append([])
            widths.append(len(key))
        rows[row].append(b)
        row_B[b], start_B[b] = row, widths[row]
        widths[row] += len(completion)
    ids_RW, position_RW = np.zeros((2, len(rows), max(widths)), dtype=np.int64)
    part_RW = np.full(ids_RW.shape, -1, dtype=np.int64)
    for row, members in enumerate(rows):
        prompt = prompts[members[0]]
        ids_RW[row, : len(prompt)] = prompt
        position_RW[row, : len(prompt)] = np.arange(len(prompt))
        part_RW[row, : len(prompt)] = 0
        for part, b in enumerate(members, start=1):
            columns = slice(start_B[b], start_B[b] + len(completions[b]))
            ids_RW[row, columns] = completions[b]
            position_RW[row, columns] = len(prompt) + np.arange(len(completions[b]))
            part_RW[row, columns] = part
    num_states = 1 + max(len(completion) for completion in completions)
    length_B = np.array([len(completion) for completion in completions])
    behind_BS = np.minimum(np.arange(num_states), length_B[:, None])
    prompt_end_B = np.array([len(prompt) - 1 for prompt in prompts])
    column_BS = np.where(behind_BS > 0, start_B[:, None] + behind_BS - 1, prompt_end_B[:, None])
    return Packing(
        ids_RW=ids_RW, position_RW=position_RW, part_RW=part_RW, row_B=row_B, column_BS=column_BS
    )
