"""A pool of processes that make checks (reward.checks): verifiers, and tools of somebody's own.

Nobody's function runs in the process that asks: one that hangs is ended with its process, and the
call is made again in another. What fails time and again is a failure, and never a value.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import BoundedSemaphore, Timer
from time import monotonic
from typing import Any

logger = logging.getLogger(__name__)

Call = tuple[Any, ...]  # number of the check, text, and for a verifier the record as JSON
_ATTEMPTS = 3
_GIVEN_UP = 12  # processes that a check has ended before it gave any value
# Scorings in a row of which a check failed the whole, after which it counts as broken: one that has
# given values, and one that has given none.
_FAILED_SCORINGS = 16
_FAILED_AT_FIRST = 3
_BLOCK = 64  # calls that a process is handed at once: their answers fit into a pipe
_START_S = 120.0  # longest import of the functions' modules
_GRACE_S = 5.0  # by which a process ends itself before it is ended


class UnusableCheck(ValueError):
    """A function that is not there, that takes other arguments, or that cannot be imported."""


class CheckFailed(RuntimeError):
    """A check that raised, hung or said what is no score, as often as it was tried."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that was tried as often as it may be: why there is no value."""

    reason: str


class CheckPool:
    """Makes checks in `processes` processes, which start when they are needed.

    Args:
        specifications: name and pattern of each check.
        given: what each call tells a check, by name.
        accept: what a value becomes; a ValueError says why it is none.
        deadline_s: of each call.
    """

    def __init__(
        self,
        specifications: Sequence[tuple[str, str | None]],
        accept: Callable[[Any], Any],
        *,
        given: Sequence[str] = ("text", "record"),
        processes: int,
        deadline_s: float,
    ) -> None:
        self.failures = 0  # calls that failed, each attempt counted
        self._sound: set[int] = set()  # numbers of the checks that have given a value
        self._ended: Counter[int] = Counter()  # processes, by the check that ended them
        self._lost: Counter[int] = Counter()  # scorings in a row that a check failed as a whole
        self._specifications = list(specifications)
        self._accept = accept
        self._given = list(given)
        self._deadline_s = deadline_s
        self._processes = processes
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="checks")
        self._turns = BoundedSemaphore(processes)
        self._idle: list[_Process] = []
        weakref.finalize(self, _end, self._idle)

    def submit(self, calls: Sequence[Call]) -> "list[Future[list[Any]]]":
        """Start to make the calls; their values or Failures, portion after portion, in order."""
        size = max(1, min(_BLOCK, -(-len(calls) // self._processes)))
        portions = [calls[at : at + size] for at in range(0, len(calls), size)]
        return [self._threads.submit(self._make, portion) for portion in portions]

    def make(self, call: Call) -> Any:
        """Make one call in this thread as soon as a process is free; its value or Failure.

        No deadline counts the wait for a process.
        """
        with self._turns:
            (found,) = self._make([call])
        return found

    def start(self) -> None:
        """Start a process, so that what cannot be used is told now; raises UnusableCheck."""
        self._idle.append(self._process())

    def is_broken(self, check: int, *, failed: bool, last: bool = False) -> bool:
        """Whether a check will not get better, by its whole life.

        Args:
            failed: whether it has failed all its calls of one more scoring.
            last: no other scoring will tell more of one that has given no value.
        """
        self._lost[check] = self._lost[check] + 1 if failed else 0
        if check in self._sound:
            return self._lost[check] >= _FAILED_SCORINGS
        return failed and (last or self._lost[check] >= _FAILED_AT_FIRST)

    def _make(self, calls: Sequence[Call]) -> list[Any]:
        """A value or a Failure for each."""
        found: list[Any] = [None] * len(calls)
        tries, todo = [0] * len(calls), deque(range(len(calls)))
        while todo:
            # One that hangs always would cost each call of a batch a deadline and a process.
            hopeless = {number for number in todo if self._hopeless(calls[number][0])}
            for number in hopeless:
                found[number] = found[number] or Failure(
                    f"{self._name(calls[number])}: not asked any more: it has ended {_GIVEN_UP} "
                    "processes and given no value"
                )
            asked = [number for number in todo if number not in hopeless]
            todo.clear()
            if not asked:
                break
            answers = self._ask([calls[number] for number in asked])
            for number, answer in zip(asked, answers, strict=False):
                found[number] = answer
                tries[number] += 1
                if not isinstance(answer, Failure):
                    self._sound.add(calls[number][0])
                    continue
                found[number] = Failure(f"{self._name(calls[number])}: {answer.reason}")
                self.failures += 1
                logger.warning("check of %.200r: %s", calls[number][1:], found[number].reason)
                if tries[number] < _ATTEMPTS:
                    todo.append(number)
            todo.extend(asked[len(answers) :])  # behind one that ended the process
        return found

    def _ask(self, calls: Sequence[Call]) -> list[Any]:
        """As many values and Failures as one process gives: one that ends gives no more."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = self._process()
        answers = [self._value(answer) for answer in process.ask(calls)]
        if process.lives:
            self._idle.append(process)
        else:
            self._ended[calls[len(answers) - 1][0]] += 1
        return answers

    def _hopeless(self, check: int) -> bool:
        return self._ended[check] >= _GIVEN_UP and check not in self._sound

    def _name(self, call: Call) -> str:
        return self._specifications[call[0]][0]

    def _value(self, answer: dict[str, Any]) -> Any:
        if "error" in answer:
            return Failure(answer["error"])
        try:
            return self._accept(answer["value"])
        except ValueError as error:
            return Failure(str(error))

    def _process(self) -> "_Process":
        return _Process(self._specifications, self._given, self._deadline_s)


class _Process:
    """One process, which has imported the functions; raises UnusableCheck where it cannot."""

    def __init__(
        self, specifications: list[tuple[str, str | None]], given: list[str], deadline_s: float
    ) -> None:
        self._deadline_s = deadline_s
        # The working directory last, where a file may bear the name of an installed module.
        places = [os.path.abspath(place) for place in (*filter(None, sys.path), os.getcwd())]
        environment = {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}
        arguments = (specifications, given, deadline_s)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "reward.checks", *map(json.dumps, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C in a terminal is for the run; see _kill
            env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        )
        self.lives = True
        (started,) = self._read(1, _START_S)
        if "error" in started:
            self.end()
            names = ", ".join(name for name, _ in specifications if ":" in name)
            raise UnusableCheck(f"{names}: {started['error']}")

    def ask(self, calls: Sequence[Call]) -> list[dict[str, Any]]:
        """What the process says of each, up to the one that ended it."""
        return self._read(len(calls), self._deadline_s, json.dumps(calls) + "\n")

    def _read(self, count: int, each_s: float, request: str = "") -> list[dict[str, Any]]:
        """`count` lines, or fewer, the last of which says why the process has ended."""
        assert self._child.stdin is not None and self._child.stdout is not None
        # It ends itself at a call's deadline: this is for one that cannot.
        timer = Timer(count * each_s + _GRACE_S, self._kill)
        timer.start()
        with suppress(BrokenPipeError):  # reading tells
            self._child.stdin.write(request)
            self._child.stdin.flush()
        lines: list[dict[str, Any]] = []
        while self.lives and len(lines) < count:
            asked_s = monotonic()
            if (line := self._child.stdout.readline()).endswith("\n"):
                lines.append(json.loads(line))
                continue
            late = monotonic() - asked_s > 0.9 * each_s
            self.end()
            why = f"no answer within {each_s:g} s" if late else "its process ended"
            lines.append({"error": f"{why} (exit status {self._child.returncode})"})
        timer.cancel()
        return lines

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.lives = False
        self._kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(BrokenPipeError):  # what was not written is not wanted
                assert pipe is not None
                pipe.close()

    def _kill(self) -> None:
        """It and what it forked, which would hold the pipe of its answers open."""
        if self._child.returncode is None:  # else its number may be another's by now
            with suppress(ProcessLookupError, PermissionError):  # gone already
                os.killpg(self._child.pid, signal.SIGKILL)


def _end(processes: "list[_Process]") -> None:
    while processes:
        processes.pop().end()
