"""Checks of a rationale's text, and the process that makes them: `python -m reward.checks`.

    exact    the text is the answer, as `canonical` spells both
    numeric  the last number in the text is that of the answer
    regex    the pattern is found in the text

Of a check with a pattern, the first group of its last match stands for the text. A function of
somebody's own takes the text and the record that its question comes from, a dict with the keys
"question" and "answer" and all columns of the data, and returns a number from 0 to 1.

The process reads calls, a JSON list of them a line, and writes a line for each. A call that takes
too long ends the process, whatever it is doing. Imports nothing but the standard library.
"""

import faulthandler
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

BUILT_IN = ("exact", "numeric", "regex")
# Written with a colon, and not one of those: a function in a module.
FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_NUMBER = re.compile(
    r"(?<![\w.])-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII
)
_GROUPED = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")  # a comma between thousands
_LONGEST_EXPONENT = 1000  # of a number that is spelled in full
_LONGEST_REASON = 300

_PLACES = "it is looked for where Python looks: run the command in its folder, or set PYTHONPATH"

Check = Callable[..., Any]  # of the text, and of the record where it is a verifier


class Misfit(TypeError):
    """A function that takes other arguments than it is given."""


def canonical(answer: str) -> str:
    """An answer in the form in which '1,000' and '1000.0' are equal, and 'Yes ' and 'yes'."""
    try:
        number = Decimal(_GROUPED.sub("", answer.strip().removeprefix("$")))
        if number.is_finite() and abs(number.adjusted()) < _LONGEST_EXPONENT:
            plain = f"{number:f}"  # exact: `normalize` rounds to 28 digits
            return (plain.rstrip("0").rstrip(".") if "." in plain else plain) if number else "0"
    except InvalidOperation:
        pass
    return " ".join(answer.split()).casefold()


def last_number(text: str) -> str | None:
    """Of a text, as `canonical` spells it; None where it holds none."""
    found = _NUMBER.findall(text)
    return canonical(found[-1]) if found else None


def misfit(function: object, given: Sequence[str]) -> str:
    """Why `function` cannot be called with these arguments, told by their names; "" if it can."""
    called = f"it is called with {' and '.join(given)}"
    if not callable(function):
        return f"it is a {type(function).__name__}, and no function: {called}"
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a decorator may give more
    except ValueError:  # of a function in C that tells none; a cache tells what it caches
        cached = getattr(function, "__wrapped__", None)
        if cached is not None and inspect.ismethod(function):
            cached = cached.__get__(function.__self__)
        return "" if cached is None else misfit(cached, given)
    try:
        signature.bind(*given)
    except TypeError as error:
        return f"it takes {signature}, and {called}: {error}"
    return ""


def check_of(name: str, pattern: str | None, given: Sequence[str]) -> Check:
    """A built-in check, or the function that `name` leads to; raises whatever its import raises.

    Raises Misfit where it cannot be called with what is `given`.
    """
    if (function := FUNCTION.fullmatch(name)) is not None:
        found: Check = getattr(importlib.import_module(function[1]), function[2])
        if fault := misfit(found, given):
            raise Misfit(fault)
        return found
    expression = None if pattern is None else re.compile(pattern, re.DOTALL)

    def said(text: str) -> str | None:
        """What of the text is looked at."""
        if expression is None:
            return text
        matches = list(expression.finditer(text))
        return matches[-1][1 if expression.groups else 0] if matches else None

    def equal(text: str, record: Mapping[str, Any], form: Callable[[str], str | None]) -> bool:
        part = said(text)
        given = None if part is None else form(part)
        return given is not None and given == form(str(record["answer"]))

    if name == "regex" and expression is not None:  # whether or not its group took part
        return lambda text, record: expression.search(text) is not None
    return lambda text, record: equal(text, record, canonical if name == "exact" else last_number)


def serve(
    specifications: list[tuple[str, str | None]], given: Sequence[str], deadline_s: float
) -> int:
    """Answer calls [number of a check, text, record as JSON] until none comes; the exit status.

    Args:
        given: the names of what stands behind the number.
    """
    # What a function reads and prints are not the calls and the answers.
    calls, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        checks = [check_of(*each, given) for each in specifications]
    except Exception as error:  # whatever a module does when it is imported
        told = str(error) if isinstance(error, Misfit) else f"{_told(error)}; {_PLACES}"
        answers.write(json.dumps({"error": told}) + "\n")
        return 1
    answers.write(json.dumps({"value": "ready"}) + "\n")
    for line in calls:
        for number, text, *records in json.loads(line):
            faulthandler.dump_traceback_later(deadline_s, exit=True)
            try:
                value = checks[number](text, *map(json.loads, records))
                answer = json.dumps({"value": value.item() if hasattr(value, "item") else value})
            except (Exception, SystemExit) as error:
                answer = json.dumps({"error": _told(error)})
            faulthandler.cancel_dump_traceback_later()
            answers.write(answer + "\n")
    return 0


def _told(error: BaseException) -> str:
    """What went wrong in a function, and in which line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}"
    return f"{' '.join(said.split())[:_LONGEST_REASON]} ({place.filename}:{place.lineno})"


if __name__ == "__main__":
    sys.exit(serve(*map(json.loads, sys.argv[1:])))
