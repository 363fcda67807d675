"""Arithmetic questions in JSON files: one list of objects, checked item by item.

    {"str_query": "Question: 6 - 0 - 4 = ? Answer:", "num_sol": 2,
     "str_rationale": "6 - 0 =, 6 - 4 =", "str_sol": ". The answer is 2."}

`str_rationale` leaves out what the calculator adds; it and `str_sol` may be missing.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.arithmetic.expression import Expression, answer_text, compute, parse_question
from tasks.data_error import DataError, read_text, refuse

_STEP = re.compile(r"-?[0-9]+ [+-] -?[0-9]+ =")


@dataclass(frozen=True, slots=True)
class Item:
    """One question, its true answer, and the steps of its rationale where the file gives one."""

    expression: Expression
    answer: int
    steps: tuple[str, ...] | None  # each 'a + b =', the result left to the calculator


class _Record(BaseModel):
    """The file's schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    str_query: str
    num_sol: int
    str_rationale: str | None = None
    str_sol: str | None = None


def load_items(path: str) -> tuple[Item, ...]:
    """All items of a file; raises DataError, which lists the bad items with what is wrong."""
    text = read_text(path)
    try:
        records = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}; repair or regenerate it") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: must hold a list of questions, at least one")
    items, wrong = [], []
    for number, record in enumerate(records, start=1):
        try:
            items.append(_item(record, f"{path}: item {number}"))
        except DataError as error:
            wrong.append(str(error))
    refuse(wrong)
    return tuple(items)


def load_demonstrations(path: str) -> tuple[Item, ...]:
    """Items of a file in which every question has a rationale; raises DataError."""
    items = load_items(path)
    refuse(
        [
            f"{path}: item {number}: key 'str_rationale' is missing; add it, or give this file as "
            "task.questions"
            for number, item in enumerate(items, start=1)
            if item.steps is None
        ]
    )
    return items


def _item(record: Any, place: str) -> Item:
    try:
        checked = _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = f"key {first['loc'][0]!r}: " if first["loc"] else ""
        raise DataError(
            f"{place}: {key}{first['msg']}; it must have str_query (text) and num_sol (a whole "
            "number), and may have str_rationale and str_sol (text)"
        ) from error
    try:
        expression = parse_question(checked.str_query)
    except ValueError as error:
        raise DataError(f"{place}: key 'str_query': {error}; rewrite the question so") from error
    if checked.num_sol != expression.value:
        raise DataError(
            f"{place}: key 'num_sol' is {checked.num_sol}, but {expression.text} = "
            f"{expression.value}; correct the answer"
        )
    if checked.str_sol not in (None, answer_text(checked.num_sol)):
        raise DataError(
            f"{place}: key 'str_sol' is {checked.str_sol!r}; it must read "
            f"{answer_text(checked.num_sol)!r}"
        )
    return Item(expression, checked.num_sol, _steps(checked.str_rationale, checked.num_sol, place))


def _steps(rationale: str | None, answer: int, place: str) -> tuple[str, ...] | None:
    if rationale is None:
        return None
    steps = tuple(rationale.split(", "))
    for step in steps:
        if not _STEP.fullmatch(step):
            raise DataError(
                f"{place}: key 'str_rationale': step {step!r} does not read 'a + b ='; write "
                "steps of two terms, without results, joined by ', '"
            )
    left, operator, right, _ = steps[-1].split(" ")
    if compute(int(left), "+" if operator == "+" else "-", int(right)) != answer:
        raise DataError(
            f"{place}: key 'str_rationale': the last step {steps[-1]!r} does not come to num_sol, "
            f"{answer}; correct the steps"
        )
    return steps


def to_records(items: Sequence[Item]) -> list[dict[str, str | int]]:
    """The file's form of `items`; a rationale brings the written answer with it."""
    records: list[dict[str, str | int]] = []
    for item in items:
        record: dict[str, str | int] = {"str_query": item.expression.question}
        record["num_sol"] = item.answer
        if item.steps is not None:
            record["str_rationale"] = ", ".join(item.steps)
        record["str_sol"] = answer_text(item.answer)
        records.append(record)
    return records
