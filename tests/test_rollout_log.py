"""Rollouts as lines of a log: readable, one line each, at a bounded rate, whatever they say."""

import errno
import io
from collections.abc import Sequence

import pytest

from buffer.trajectory import Trajectory
from cluster.distributed.rollout_log import LoggedSink, describe, print_line
from tests.inspector_toy import HOSTILE, TOKENIZER, spelled, sums

decode = TOKENIZER.decode


class Taking:
    """A buffer that takes everything, or nothing."""

    def __init__(self) -> None:
        self.taken: list[Trajectory] = []
        self.broken = False

    def add(self, group: Sequence[Trajectory]) -> object:
        if self.broken:
            raise ConnectionError("no answer")
        self.taken += group
        return "accepted"

    def depth(self) -> int:
        return 7


def test_a_line_says_what_was_asked_thought_and_earned() -> None:
    trajectory = spelled(
        "Question: 2 + 3 = ? Answer:",
        [(" 2 + 3 =", False), (" 5", True), (", so", False)],
        answer=". The answer is 5.",
        log_reward=-1.5,
        policy_version=37,
        temperature=1.25,
        correct=True,
    )
    assert describe(trajectory, decode) == (
        "version 37, log R -1.500 nats, right, temperature 1.25: "
        "Question: 2 + 3 = ? Answer: |  2 + 3 =⟦ 5⟧, so | . The answer is 5."
    )


@pytest.mark.parametrize("text", [*HOSTILE, "a\nversion 1\r\x1b[2J\u2028\u2029\x85 | b ⟦5⟧ \\n"])
def test_what_a_model_writes_stays_in_its_place_in_one_line(text: str) -> None:
    plain = spelled("prompt", [("rationale", False), ("tool", True)])
    marks = {mark: describe(plain, decode).count(mark) for mark in "⟦⟧|"}
    hostile = spelled(f"prompt {text}", [(f"r {text}", False), (f"t {text}", True)], answer=text)
    line = describe(hostile, decode)
    assert len(line.splitlines()) == 1 and line.isprintable()
    assert {mark: line.count(mark) for mark in "⟦⟧|"} == marks


def test_long_texts_are_cut() -> None:
    line = describe(spelled("word " * 1000, [(" x" * 1000, False)], key="long"), decode)
    assert len(line) < 1000 and "more characters)" in line


def test_an_empty_rationale_has_a_line() -> None:
    assert describe(spelled("prompt", []), decode).endswith("prompt |  |  7")


def test_lines_are_few_however_many_rollouts_there_are() -> None:
    lines: list[str] = []
    now = [0.0]
    buffer = Taking()
    sink = LoggedSink(buffer, decode, write=lines.append, clock=lambda: now[0])
    rollouts = sums(40)
    for _ in range(100):
        assert sink.add(rollouts) == "accepted"
        now[0] += 0.1
    assert len(buffer.taken) == 4000
    assert len(lines) in (8 + 19, 8 + 20), "a burst, and then two a second"
    assert sink.depth() == 7


def test_only_what_the_buffer_has_taken_is_told() -> None:
    lines: list[str] = []
    buffer = Taking()
    buffer.broken = True
    with pytest.raises(ConnectionError):
        LoggedSink(buffer, decode, write=lines.append).add(sums(1))
    assert lines == []


def test_a_stream_that_lacks_a_character_gets_its_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "out"
    with path.open("w", encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        print_line("⟦5⟧")
    assert path.read_text() == "\\u27e65\\u27e7\n"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_the_line_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", FullDisk())
    print_line("lost")
