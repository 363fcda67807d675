"""Sums and differences of one-digit operands: their text, their value, their solution in steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Operator = Literal["+", "-"]
ANSWER_LEAD = ". The answer is"  # what every Y begins with
_QUESTION = re.compile(r"Question: ([0-9](?: [+-] [0-9])+) = \? Answer:")


@dataclass(frozen=True, slots=True)
class Step:
    """One line of working, 'left operator right = result'."""

    left: int
    operator: Operator
    right: int
    result: int

    @property
    def request(self) -> str:
        """The step up to '=', where a calculator takes over."""
        return f"{self.left} {self.operator} {self.right} ="

    @property
    def text(self) -> str:
        return f"{self.request} {self.result}"


def compute(left: int, operator: Operator, right: int) -> int:
    return left + right if operator == "+" else left - right


@dataclass(frozen=True, slots=True)
class Expression:
    """One-digit operands joined by + and -, read from left to right."""

    operands: tuple[int, ...]
    operators: tuple[Operator, ...]

    @property
    def text(self) -> str:
        rest = zip(self.operators, self.operands[1:], strict=True)
        return " ".join([str(self.operands[0]), *(f"{sign} {digit}" for sign, digit in rest)])

    @property
    def question(self) -> str:
        return f"Question: {self.text} = ? Answer:"

    @property
    def value(self) -> int:
        return self.steps[-1].result if self.operators else self.operands[0]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The solution from left to right."""
        steps: list[Step] = []
        left = self.operands[0]
        for operator, right in zip(self.operators, self.operands[1:], strict=True):
            steps.append(Step(left, operator, right, compute(left, operator, right)))
            left = steps[-1].result
        return tuple(steps)


def parse_question(text: str) -> Expression:
    """The expression of 'Question: 6 - 0 - 4 = ? Answer:'; raises ValueError for any other text."""
    match = _QUESTION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} does not read 'Question: a + b - c = ? Answer:'")
    words: Sequence[str] = match[1].split(" ")
    operators: list[Operator] = ["+" if word == "+" else "-" for word in words[1::2]]
    return Expression(tuple(int(word) for word in words[::2]), tuple(operators))


def answer_text(value: int) -> str:
    return f"{ANSWER_LEAD} {value}."
