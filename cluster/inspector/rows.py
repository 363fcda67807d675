"""Stored trajectories as the table knows them: what it filters and sorts by, and what it shows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from buffer.browser import Summary, Tally
from buffer.trajectory import Trajectory
from lm.spelling import Decode, Piece, split_pieces, stretches


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
    return [(start, end) for by_tool, start, end in stretches(from_tool) if by_tool]
