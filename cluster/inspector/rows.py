"""Stored trajectories as the table knows them: what it filters and sorts by, and what it shows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from buffer.browser import Summary, Tally
from buffer.trajectory import Trajectory

Decode = Callable[[list[int]], str]
# Tokens before a cut that are decoded with what follows it: more than any character or the space
# of a word has.
_CONTEXT = 16


class Piece(NamedTuple):
    """A stretch of a rationale that one side wrote."""

    text: str
    from_tool: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Summary):
    """A trajectory in the index; its rationale is not decoded."""

    prompt: str
    tally: Tally

    def age(self, version: int) -> int:
        """Versions since the one that sampled it."""
        return max(0, version - self.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Entry):
    """A trajectory as it is shown, its texts decoded, without its per-token arrays."""

    pieces: tuple[Piece, ...]
    answer: str
    log_q: float  # nats, recorded: of the whole rationale and the stop behind it
    behaviour: str
    temperature: float
    actor: str

    def beginning(self, characters: int) -> tuple[Piece, ...]:
        """Its first pieces, cut after so many characters; an ellipsis says so."""
        shown: list[Piece] = []
        for piece in self.pieces:
            if len(piece.text) > characters:
                return (*shown, Piece(f"{piece.text[:characters]}…", piece.from_tool))
            shown.append(piece)
            characters -= len(piece.text)
        return self.pieces


def row_of(trajectory: Trajectory, decode: Decode, tally: Tally) -> Row:
    from_tool = trajectory.from_tool.tolist()
    return Row(
        **asdict(Summary.of(trajectory)),
        tally=tally,
        prompt=decode(trajectory.prompt.tolist()),
        pieces=split_pieces(trajectory.completion.tolist(), from_tool, decode),
        answer=decode(trajectory.answer.tolist()),
        log_q=trajectory.log_q,
        behaviour=trajectory.behaviour,
        temperature=trajectory.temperature,
        actor=trajectory.actor,
    )


def tool_spans(from_tool: Sequence[bool]) -> list[tuple[int, int]]:
    """Prefix lengths between which a tool wrote: (before its first token, after its last)."""
    return [(start, end) for by_tool, start, end in _stretches(from_tool) if by_tool]


def split_pieces(
    tokens: Sequence[int], from_tool: Sequence[bool], decode: Decode
) -> tuple[Piece, ...]:
    """The text, cut where the writer changes."""
    stretches = _stretches(from_tool)
    texts = split_text(tokens, [end for _, _, end in stretches], decode)
    pairs = zip(texts, stretches, strict=True)
    return tuple(Piece(text, by_tool) for text, (by_tool, _, _) in pairs if text)


def _stretches(from_tool: Sequence[bool]) -> list[tuple[bool, int, int]]:
    """Stretches of one writer: whether it is the tool, and the tokens before and up to its end."""
    runs = [(by_tool, len(list(marks))) for by_tool, marks in groupby(from_tool)]
    ends = accumulate(length for _, length in runs)
    return [(by_tool, end - length, end) for (by_tool, length), end in zip(runs, ends, strict=True)]


def split_text(tokens: Sequence[int], ends: Sequence[int], decode: Decode) -> list[str]:
    """The text of tokens, cut after each of the rising numbers of tokens `ends`.

    Tokens are decoded with some of those before them, on which their text may depend: the space
    of a first word, the bytes of one character.
    """
    texts = []
    for last, end in pairwise([0, *ends]):
        start = max(0, last - _CONTEXT)
        before = decode(list(tokens[start:last])) if last else ""
        texts.append(decode(list(tokens[start:end]))[len(before) :])
    return texts
