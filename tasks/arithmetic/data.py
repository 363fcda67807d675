"""Arithmetic questions in files (tasks.records), checked item by item.

    {"str_query": "Question: 6 - 0 - 4 = ? Answer:", "num_sol": 2,
     "str_rationale": "6 - 0 =, 6 - 4 =", "str_sol": ". The answer is 2."}

`str_rationale` leaves out what the calculator adds; it and `str_sol` may be missing.
"""

import re
from dataclasses import dataclass

from lm.config import Frozen
from tasks.arithmetic.expression import Expression, answer_text, compute, parse_question
from tasks.records import read_records, refuse

_STEP = re.compile(r"-?[0-9]+ [+-] -?[0-9]+ =")


@dataclass(frozen=True, slots=True)
class Item:
    """One question, its true answer, and the steps of its rationale where the file gives one."""

    expression: Expression
    answer: int
    steps: tuple[str, ...] | None  # each 'a + b =', the result left to the calculator


class _Record(Frozen):
    str_query: str
    num_sol: int
    str_rationale: str | None = None
    str_sol: str | None = None


def load_items(path: str) -> tuple[Item, ...]:
    """All items of a file; raises DataError, which lists the bad items with what is wrong."""
    return read_records(path, _Record, _item)


def load_demonstrations(path: str) -> tuple[Item, ...]:
    """Items of a file in which every question has a rationale; raises DataError."""
    items = load_items(path)
    remedy = "key 'str_rationale' is missing; add it, or give this file as task.questions"
    unworked = [number for number, item in enumerate(items, start=1) if item.steps is None]
    refuse([f"{path}: item {number}: {remedy}" for number in unworked])
    return items


def _item(record: _Record) -> Item:
    """Raises ValueError for one that contradicts itself."""
    try:
        expression = parse_question(record.str_query)
    except ValueError as error:
        raise ValueError(f"key 'str_query': {error}; rewrite the question so") from error
    if record.num_sol != expression.value:
        raise ValueError(
            f"key 'num_sol' is {record.num_sol}, but {expression.text} = {expression.value}; "
            "correct the answer"
        )
    if record.str_sol not in (None, answer_text(record.num_sol)):
        raise ValueError(
            f"key 'str_sol' is {record.str_sol!r}; it must read {answer_text(record.num_sol)!r}"
        )
    return Item(expression, record.num_sol, _steps(record.str_rationale, record.num_sol))


def _steps(rationale: str | None, answer: int) -> tuple[str, ...] | None:
    if rationale is None:
        return None
    steps = tuple(rationale.split(", "))
    for step in steps:
        if not _STEP.fullmatch(step):
            raise ValueError(
                f"key 'str_rationale': step {step!r} does not read 'a + b ='; write steps of two "
                "terms, without results, joined by ', '"
            )
    left, operator, right, _ = steps[-1].split(" ")
    if compute(int(left), "+" if operator == "+" else "-", int(right)) != answer:
        raise ValueError(
            f"key 'str_rationale': the last step {steps[-1]!r} does not come to num_sol, {answer}; "
            "correct the steps"
        )
    return steps
