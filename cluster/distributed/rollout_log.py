"""An actor's rollouts as lines of its log, where Ray's dashboard shows them to people."""

import contextlib
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence

from actors.protocols import TrajectorySink
from buffer.trajectory import Trajectory

Decode = Callable[[list[int]], str]
# A person reads no faster, and a day of it is some 50 MB at most.
_LINES_PER_S = 2.0
_BURST_LINES = 8.0
_LONGEST_TEXT = 300
_TOOL_BEGINS, _TOOL_ENDS = "⟦", "⟧"


class LoggedSink:
    """The replay buffer as an actor sees it; some of what it has taken is written down.

    Args:
        write: takes one line; standard output, which Ray keeps as the actor's log, by default.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        buffer: TrajectorySink,
        decode: Decode,
        *,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._buffer = buffer
        self._decode = decode
        self._write = write or print_line
        self._clock = clock
        self._allowance = _BURST_LINES
        self._seen_s = clock()

    def add(self, group: Sequence[Trajectory]) -> object:
        """Store one group; when this returns, the buffer owns it."""
        answer = self._buffer.add(group)
        now = self._clock()
        grown = self._allowance + (now - self._seen_s) * _LINES_PER_S
        self._allowance, self._seen_s = min(_BURST_LINES, grown), now
        shown = group[: int(self._allowance)]
        self._allowance -= len(shown)
        for trajectory in shown:
            self._write(describe(trajectory, self._decode))
        return answer

    def depth(self) -> int:
        """Groups stored that the learner has not drawn yet."""
        return self._buffer.depth()


def print_line(line: str) -> None:
    """Print a line; what the stream's encoding lacks is written out, and a full disk loses lines.

    Neither is an error: an actor has better to do than to write its log.
    """
    encoding = sys.stdout.encoding or "utf-8"
    with contextlib.suppress(OSError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def describe(trajectory: Trajectory, decode: Decode) -> str:
    """One line: version, log R, verdict, temperature; prompt | rationale | answer.

    What a tool wrote stands in ⟦ ⟧. Nothing that a model or a data file says can end the line, move
    a terminal's cursor, turn the direction of the text or pass for a mark of ours.
    """
    verdict = {True: "right", False: "wrong", None: "not judged"}[trajectory.correct]
    facts = (
        f"version {trajectory.policy_version}, log R {trajectory.terminal_log_reward:.3f} nats, "
        f"{verdict}, temperature {trajectory.temperature:.3g}"
    )
    parts = (
        clipped(decode(trajectory.prompt.tolist())),
        _rationale(trajectory, decode),
        clipped(decode(trajectory.answer.tolist())),
    )
    return f"{facts}: {' | '.join(parts)}"


def _rationale(trajectory: Trajectory, decode: Decode) -> str:
    tokens, by_tool = trajectory.completion.tolist(), trajectory.from_tool.tolist()
    cuts = [t for t in range(1, len(tokens)) if by_tool[t] != by_tool[t - 1]]
    pieces, before = [], ""
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        # Decoded from the start: the text of a token may depend on those before it.
        whole = decode(tokens[:end])
        text, before = clipped(whole[len(before) :]), whole
        marked = bool(tokens) and by_tool[start]
        pieces.append(f"{_TOOL_BEGINS}{text}{_TOOL_ENDS}" if marked else text)
    return "".join(pieces)


def clipped(text: str) -> str:
    """Text that is fit for a line, and not longer than a line should be."""
    left_out = len(text) - _LONGEST_TEXT
    shown = "".join(map(_in_line, text[:_LONGEST_TEXT]))
    return f"{shown}... ({left_out} more characters)" if left_out > 0 else shown


def _in_line(character: str) -> str:
    if character == "\n":
        return "\\n"
    # Category C: controls, directions of writing, halves of characters. Zl, Zp: ends of lines.
    is_hidden = unicodedata.category(character)[0] == "C"
    is_ours = character in (_TOOL_BEGINS, _TOOL_ENDS, "|", "\\")
    if is_hidden or is_ours or unicodedata.category(character) in ("Zl", "Zp"):
        return f"\\u{{{ord(character):x}}}"
    return character
