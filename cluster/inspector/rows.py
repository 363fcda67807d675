"""A stored trajectory as the table knows it: what it filters, sorts and shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from buffer.browser import Tally
from buffer.trajectory import Trajectory

Decode = Callable[[list[int]], str]


class Piece(NamedTuple):
    """A stretch of a rationale that one side wrote."""

    text: str
    from_tool: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trajectory, its texts decoded, without its per-token arrays."""

    id: str
    task: str
    prompt_key: str
    prompt: str
    pieces: tuple[Piece, ...]
    answer: str
    num_tokens: int  # of the rationale, the tool's included
    log_reward: float  # nats, untempered, of the whole rationale
    log_q: float  # nats, recorded: of the whole rationale and the stop behind it
    correct: bool | None
    version: int
    behaviour: str
    temperature: float
    actor: str
    created_s: float  # unix seconds
    tally: Tally

    @property
    def rationale(self) -> str:
        """Its whole text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def used_tool(self) -> bool:
        """Whether a tool inserted any of it."""
        return any(piece.from_tool for piece in self.pieces)

    def age(self, version: int) -> int:
        """Versions since the one that sampled it."""
        return max(0, version - self.version)


@dataclass(frozen=True, slots=True)
class Texts:
    """The decoded parts of a trajectory."""

    prompt: str
    pieces: tuple[Piece, ...]
    answer: str


def texts_of(trajectory: Trajectory, decode: Decode) -> Texts:
    """Decode a trajectory."""
    return Texts(
        prompt=decode(trajectory.prompt.tolist()),
        pieces=split_pieces(trajectory.completion.tolist(), trajectory.from_tool.tolist(), decode),
        answer=decode(trajectory.answer.tolist()),
    )


def row_of(trajectory: Trajectory, texts: Texts, tally: Tally) -> Row:
    """The row of a trajectory with these texts and this history."""
    return Row(
        id=trajectory.id,
        task=trajectory.task,
        prompt_key=trajectory.prompt_key,
        prompt=texts.prompt,
        pieces=texts.pieces,
        answer=texts.answer,
        num_tokens=trajectory.completion.size,
        log_reward=trajectory.terminal_log_reward,
        log_q=float(np.sum(trajectory.log_q_token, dtype=np.float64) + trajectory.log_q_stop[-1]),
        correct=trajectory.correct,
        version=trajectory.policy_version,
        behaviour=trajectory.behaviour,
        temperature=trajectory.temperature,
        actor=trajectory.actor,
        created_s=trajectory.created_s,
        tally=tally,
    )


def tool_spans(from_tool: Sequence[bool]) -> list[tuple[int, int]]:
    """Prefix lengths between which a tool wrote: (before its first token, behind its last)."""
    marks = [False, *from_tool, False]
    changes = [t for t in range(1, len(marks)) if marks[t] != marks[t - 1]]
    return [(start - 1, end - 1) for start, end in zip(changes[::2], changes[1::2], strict=True)]


def split_pieces(
    tokens: Sequence[int], from_tool: Sequence[bool], decode: Decode
) -> tuple[Piece, ...]:
    """The text, cut where the writer changes."""
    cuts = [t for t in range(1, len(tokens)) if from_tool[t] != from_tool[t - 1]]
    starts, ends = [0, *cuts], [*cuts, len(tokens)]
    return tuple(
        Piece(text, from_tool[start])
        for text, start in zip(split_text(tokens, ends, decode), starts, strict=True)
        if text
    )


def split_text(tokens: Sequence[int], ends: Sequence[int], decode: Decode) -> list[str]:
    """The text of tokens, cut behind each of the rising numbers of tokens `ends`.

    A prefix is decoded whole, since the text of a token may depend on those before it, such as
    the space of a first word or the bytes of one character.
    """
    prefixes = ["", *(decode(list(tokens[:end])) for end in ends)]
    return [longer[len(shorter) :] for shorter, longer in pairwise(prefixes)]
