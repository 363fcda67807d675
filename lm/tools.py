"""Tools that speak into a completion while it is being sampled.

A tool is asked whenever the policy calls it, so as often as it is called in one completion. That it
is called, and what it says then, follows from the tokens before: it is a transition of the
environment, of probability 1, and no action of the policy.

Each call is made in a thread of its own, so that it delays only the row that waits for it. A call
that fails, or whose answer is late, ends that row: there is no completion, and never a reward.
"""

import operator
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from queue import SimpleQueue
from time import monotonic
from typing import Any, Protocol, TypeVar

from lm.spelling import ANY_WORD, spell

_Call = tuple["Future[list[int]]", tuple[int, ...]]
_POLL_S = 0.01
# Completions, or groups of them, that a tool has ended one after the other: it will not get better.
FAILED_IN_A_ROW = 16
_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoding shows for a part of a character


class Tool(Protocol):
    """Speaks into a completion after certain tokens, or a certain text."""

    @property
    def triggers(self) -> Collection[int]:
        """Tokens that call the tool, when the policy has chosen them; all, or as a TriggerText."""

    def output(self, completion: Sequence[int]) -> list[int]:
        """Tokens to insert after `completion`, which calls the tool; [] for none.

        May be asked by several threads at once.
        """


class TriggerText(Collection[int]):
    """Calls a tool behind a text, however tokens spell it; holds those that may complete it.

    A token completes the text if that is in what the policy has written since the tool last spoke,
    and ends in what the token adds. Where the token goes on behind it, as ">." does behind
    "</search>", the tool speaks behind the whole token.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        """Raises ValueError for no text."""
        if not text:
            raise ValueError("a tool is called behind a text, and this one is empty")
        self.text, self._tokenizer = text, tokenizer
        # A token's text is that behind another word: some tokenizers drop a space at the beginning.
        self._before = spell(tokenizer, ANY_WORD)
        self._shown = len(tokenizer.decode(list(self._before)))
        ends = tuple(text[at:] for at in range(len(text)))
        self._tokens = frozenset(
            token
            for token, added in enumerate(self._added([n]) for n in range(len(tokenizer)))
            if added.startswith(ends) or text in added or (_HALF in added and not text.isascii())
        )

    def __contains__(self, token: object) -> bool:
        return token in self._tokens

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def completed(self, written: Sequence[int]) -> bool:
        """Whether the last of these tokens completes the text."""
        before, after = self._added(written[:-1]), self._added(written)
        stood = len(before.rstrip(_HALF))
        return after.find(self.text, max(0, stood - len(self.text) + 1)) >= 0

    def _added(self, tokens: Sequence[int]) -> str:
        together: str = self._tokenizer.decode([*self._before, *tokens])
        return together[self._shown :]


def is_called(tool: Tool, tokens: Sequence[int], from_tool: Sequence[bool]) -> bool:
    """Whether the newest of a completion's tokens calls the tool.

    None that the tool inserted does, nor is it part of a text that does.
    """
    if from_tool[-1] or tokens[-1] not in tool.triggers:
        return False
    if not isinstance(tool.triggers, TriggerText):
        return True
    spoke = next((at for at in reversed(range(len(tokens))) if from_tool[at]), -1)
    return tool.triggers.completed(tokens[spoke + 1 :])


def insertion(tool: Tool | None, tokens: Sequence[int], from_tool: Sequence[bool]) -> list[int]:
    """What is inserted after a completion so far: [] where no tool is called, or says nothing."""
    if tool is None or not is_called(tool, tokens, from_tool):
        return []
    return list(tool.output(tuple(tokens)))


class ToolFailed(RuntimeError):
    """A tool that raised, hung or said what is no text, as often as it was asked."""


@dataclass(frozen=True, slots=True)
class ToolFault:
    """What a request ends with whose tool failed: no completion."""

    error: Exception

    @property
    def reason(self) -> str:
        """One line for people."""
        return f"{type(self.error).__name__}: {self.error}"


T = TypeVar("T")
_Request = TypeVar("_Request")


def drawn_again(
    requests: Sequence[_Request],
    submit: Callable[[Sequence[_Request]], list[int]],
    step: Callable[[], "list[tuple[int, T | ToolFault]]"],
    progress: Callable[[int], None] = lambda ended: None,
) -> "list[T | ToolFault]":
    """What each request ends with, in order; one that a tool ended is made once more.

    If that is ended again, it alone has no completion. Raises what a tool raised that ended
    FAILED_IN_A_ROW so, one after the other.

    Args:
        submit, step: of a sampler: the numbers of requests, and what has ended since, by number.
        progress: told after each step how many have ended.
    """
    places = dict(zip(submit(requests), range(len(requests)), strict=True))
    done: dict[int, T | ToolFault] = {}
    again: set[int] = set()
    failed = 0
    while len(done) < len(requests):
        for number, ended in step():
            place = places[number]
            if not isinstance(ended, ToolFault):
                done[place], failed = ended, 0
            elif place not in again:
                again.add(place)
                places |= {other: place for other in submit([requests[place]])}
            else:
                done[place], failed = ended, failed + 1
                if failed >= FAILED_IN_A_ROW:
                    raise ended.error
        progress(len(done))
    return [done[place] for place in range(len(requests))]


def unfailing(ended: "Sequence[T | ToolFault]") -> list[T]:
    """All of them; raises what a tool raised where it ended one."""
    found: list[T] = []
    for one in ended:
        if isinstance(one, ToolFault):
            raise one.error
        found.append(one)
    return found


class ToolCall:
    """A call under way."""

    def __init__(self, answer: "Future[list[int]]", timeout_s: float) -> None:
        self.answer, self._timeout_s = answer, timeout_s
        self._asked_s = monotonic()

    @property
    def over(self) -> bool:
        """Whether `result` says at once what there is: an answer, an error, or that it is late."""
        return self.answer.done() or monotonic() - self._asked_s >= self._timeout_s

    def result(self) -> list[int]:
        """Wait for the tokens to insert; raises TimeoutError, and whatever the tool raises."""
        try:
            return self.answer.result(max(self._asked_s + self._timeout_s - monotonic(), 0.0))
        except TimeoutError:
            if self.answer.done():  # the tool's own
                raise
            raise TimeoutError(f"a tool gave no answer within {self._timeout_s:g} s") from None


def wait_for_any(calls: Sequence[ToolCall]) -> None:
    """Until one of them is answered, or a moment, after which another may be late."""
    wait([call.answer for call in calls], _POLL_S, return_when=FIRST_COMPLETED)


class ToolDesk:
    """Asks a tool in threads, as many as there are calls at once.

    A thread whose call never ends is left to itself: nobody can end it. Tools that may hang run in
    processes, as those of `task.tools` do.

    Args:
        vocab_size: of the model that is to read what the tool says.
        timeout_s: longest wait for an answer, with what a tool waits for before it starts.
    """

    def __init__(self, tool: Tool, *, vocab_size: int, timeout_s: float) -> None:
        self._tool, self._vocab_size, self._timeout_s = tool, vocab_size, timeout_s
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads = 0
        self._open: list[Future[list[int]]] = []
        weakref.finalize(self, self._calls.put, None)

    def ask(self, tokens: Sequence[int], from_tool: Sequence[bool]) -> ToolCall | None:
        """Start to ask what is to be inserted after a completion so far; None where its newest
        token does not call the tool. Returns at once."""
        if not is_called(self._tool, tokens, from_tool):
            return None
        self._open = [answer for answer in self._open if not answer.done()]
        answer: Future[list[int]] = Future()
        self._open.append(answer)
        self._calls.put((answer, tuple(tokens)))
        if len(self._open) > self._threads:
            self._threads += 1
            # A daemon, or a call that hangs would keep the process from ending.
            arguments = (self._tool, self._vocab_size, self._calls)
            threading.Thread(target=_serve, args=arguments, name="tool", daemon=True).start()
        return ToolCall(answer, self._timeout_s)


def _serve(tool: Tool, vocab_size: int, calls: "SimpleQueue[_Call | None]") -> None:
    """Answer calls until the desk is gone; holds no reference to it."""
    while (call := calls.get()) is not None:
        answer, tokens = call
        try:
            answer.set_result(ask_tool(tool, tokens, vocab_size))
        except Exception as error:  # whatever a tool of somebody's own raises
            answer.set_exception(error)
        del call, answer
    calls.put(None)  # for the next thread


def ask_tool(tool: Tool, tokens: Sequence[int], vocab_size: int) -> list[int]:
    """What a tool inserts after `tokens`; raises ValueError for what the model cannot read, and
    TypeError for what is no token."""
    output = [operator.index(token) for token in tool.output(tuple(tokens))]
    if not all(0 <= token < vocab_size for token in output):
        raise ValueError(f"tool inserted tokens {output}, outside the vocabulary of {vocab_size}")
    return output
