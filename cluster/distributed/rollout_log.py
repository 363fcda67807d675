"""An actor's rollouts as lines of its log, where Ray's dashboard shows them to people."""

import contextlib
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.protocols import TrajectorySink
from buffer.trajectory import Trajectory
from lm.spelling import Decode, split_pieces

# A person reads no faster, and a day of it is some 50 MB at most.
_LINES_PER_S = 2.0
_BURST_LINES = 8.0
_LONGEST_TEXT = 300
_TOOL_BEGINS, _TOOL_ENDS = "⟦", "⟧"


def print_line(line: str) -> None:
    """Print a line; what the stream's encoding lacks is escaped, and a full disk loses lines."""
    encoding = sys.stdout.encoding or "utf-8"
    with contextlib.suppress(OSError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


@dataclass
class LoggedSink:
    """The replay buffer as an actor sees it; some of what it has taken is written down."""

    buffer: TrajectorySink
    decode: Decode
    write: Callable[[str], None] = print_line  # Ray keeps standard output as the actor's log
    clock: Callable[[], float] = time.monotonic  # seconds

    def __post_init__(self) -> None:
        self._allowance = _BURST_LINES
        self._seen_s = self.clock()

    def add(self, group: Sequence[Trajectory]) -> object:
        answer = self.buffer.add(group)
        now = self.clock()
        grown = self._allowance + (now - self._seen_s) * _LINES_PER_S
        self._allowance, self._seen_s = min(_BURST_LINES, grown), now
        shown = group[: int(self._allowance)]
        self._allowance -= len(shown)
        for trajectory in shown:
            self.write(describe(trajectory, self.decode))
        return answer

    def depth(self) -> int:
        return self.buffer.depth()


def describe(trajectory: Trajectory, decode: Decode) -> str:
    """One line: version, log R, verdict, temperature; prompt | rationale | answer.

    What a tool wrote stands in ⟦ ⟧. Nothing that a model or a data file says can end the line, move
    a terminal's cursor, turn the direction of the text or pass for a mark of ours.
    """
    verdict = {True: "right", False: "wrong", None: "not judged"}[trajectory.correct]
    prompt = clipped(decode(trajectory.prompt.tolist()))
    answer = clipped(decode(trajectory.answer.tolist()))
    tokens, by_tool = trajectory.completion.tolist(), trajectory.from_tool.tolist()
    pieces = ((clipped(text), tool) for text, tool in split_pieces(tokens, by_tool, decode))
    rationale = "".join(
        f"{_TOOL_BEGINS}{text}{_TOOL_ENDS}" if tool else text for text, tool in pieces
    )
    return (
        f"version {trajectory.policy_version}, log R {trajectory.terminal_log_reward:.3f} nats, "
        f"{verdict}, temperature {trajectory.temperature:.3g}: "
        f"{prompt} | {rationale} | {answer}"
    )


def clipped(text: str) -> str:
    """Text that is fit for a line, and not longer than a line should be."""
    left_out = len(text) - _LONGEST_TEXT
    shown = "".join(map(_in_line, text[:_LONGEST_TEXT]))
    return f"{shown}... ({left_out} more characters)" if left_out > 0 else shown


def _in_line(character: str) -> str:
    if character == "\n":
        return "\\n"
    # Not printable: controls, directions of writing, halves of characters, ends of lines.
    is_ours = character in (_TOOL_BEGINS, _TOOL_ENDS, "|", "\\")
    shown = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if shown and not is_ours else f"\\u{{{ord(character):x}}}"
