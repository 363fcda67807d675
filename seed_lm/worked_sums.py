"""Arithmetic as people write it down: questions with worked answers, many of them wrong.

Writers differ. A careful one works from left to right and hardly errs; a sloppy one errs more often
the harder the step, each kind of step in its own way: where the result would fall below zero he
turns the subtraction round, where the operand is large or the value below zero he adds what he
should subtract, or the reverse. All copy wrongly, leave operands out or stop early now and then.
A document does not say who wrote it, so a language model of it knows the skill and yet errs. Its
errors hang on the step at hand and not on the step's place, so that whoever learns to avoid them in
short workings avoids them in long ones.

What matters for inference with such a model: after a wrong working the right answer is rare,
because the answer follows the working, slips aside.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from tasks.arithmetic.expression import (
    Expression,
    Operator,
    Step,
    answer_text,
    compute,
)

T = TypeVar("T")
Act = Literal["right", "stop", "skip", "swap", "flip", "miscopy", "stale"]
Situation = Literal["easy", "large_operand", "falls_below_zero", "is_below_zero"]

OPERATORS: tuple[Operator, Operator] = ("+", "-")
# One expression in HELD_OUT_EVERY never enters the corpus, and only those are tested on.
HELD_OUT_EVERY = 5
LARGE = 6  # operands from here on trouble a sloppy writer

# What a writer does at a step; weights, not yet normalised.
Habits = Mapping[Situation, Mapping[Act, float]]
SLOPPY: Habits = {
    "easy": {"right": 78, "stop": 7, "skip": 4, "flip": 4, "miscopy": 4, "stale": 3},
    "large_operand": {"right": 6, "stop": 4, "skip": 5, "flip": 76, "miscopy": 5, "stale": 4},
    "falls_below_zero": {"right": 6, "stop": 4, "skip": 4, "swap": 76, "flip": 6, "miscopy": 4},
    "is_below_zero": {"right": 6, "stop": 4, "skip": 5, "flip": 76, "miscopy": 5, "stale": 4},
}
CAREFUL: Habits = {
    situation: {"right": 98.5, "stop": 0.5, "skip": 0.5, "flip": 0.3, "miscopy": 0.2}
    for situation in SLOPPY
}


@dataclass(frozen=True, slots=True, eq=False)
class Writer:
    """How one kind of writer works; chances in [0, 1]."""

    habits: Habits
    reorders: float  # takes a later term before an earlier one, which is no error
    overruns: float  # goes on after the last operand
    breaks_off: float  # leaves the working in the middle of a step, and answers from there
    slips: float  # writes a wrong result behind '='
    misreports: float  # gives an answer other than the last result


CAREFUL_WRITER = Writer(
    CAREFUL,
    reorders=0.03,
    overruns=0.002,
    breaks_off=0.005,
    slips=0.002,
    misreports=0.002,
)
SLOPPY_WRITER = Writer(
    SLOPPY,
    reorders=0.05,
    overruns=0.005,
    breaks_off=0.08,
    slips=0.03,
    misreports=0.04,
)


# Writers and their shares of the pages.
WRITERS = {CAREFUL_WRITER: 0.16, SLOPPY_WRITER: 0.84}
# Numbers of operands, and of questions on a page, with their shares.
OPERANDS = {2: 0.1, 3: 0.2, 4: 0.25, 5: 0.25, 6: 0.2}
QUESTIONS = {1: 0.85, 2: 0.05, 3: 0.05, 4: 0.05}


@dataclass(frozen=True, slots=True)
class WorkedSums:
    """Corpus of pages; a page has one writer and a line for each question."""

    name: str = "worked sums"

    def document(self, rng: random.Random) -> str:
        writer = draw(WRITERS, rng)
        lines = [write_line(draw_question(rng), writer, rng) for _ in range(draw(QUESTIONS, rng))]
        return "\n".join(lines)


def draw(weights: Mapping[T, float], rng: random.Random) -> T:
    """One of the keys, by its weight."""
    [key] = rng.choices(list(weights), list(weights.values()))
    return key


def draw_expression(num_operands: int, rng: random.Random) -> Expression:
    """An expression with every operand and operator uniform."""
    operands = tuple(rng.randrange(10) for _ in range(num_operands))
    operators = tuple(rng.choice(OPERATORS) for _ in range(num_operands - 1))
    return Expression(operands, operators)


def is_held_out(expression: Expression) -> bool:
    """The corpus must not ask this; pairs, being the steps, are asked."""
    digest = hashlib.blake2b(expression.text.encode(), digest_size=8).digest()
    return len(expression.operands) > 2 and int.from_bytes(digest, "big") % HELD_OUT_EVERY == 0


def draw_question(rng: random.Random) -> Expression:
    """An expression of two to six operands that is not held out."""
    num_operands = draw(OPERANDS, rng)
    while is_held_out(expression := draw_expression(num_operands, rng)):
        pass
    return expression


def write_line(expression: Expression, writer: Writer, rng: random.Random) -> str:
    """Question, working and answer, as one writer puts them down."""
    steps = work_out(expression, writer, rng)
    working = ", ".join(step.text for step in steps)
    answer = report([step.result for step in steps], writer, rng)
    if rng.random() < writer.breaks_off:
        working, results = break_off(steps, rng)
        answer = report(results, writer, rng)
    return f"{expression.question} {working}{answer_text(answer)}"


def break_off(steps: Sequence[Step], rng: random.Random) -> tuple[str, list[int]]:
    """The working up to somewhere in one of its steps, and the numbers reached until there."""
    reached = rng.randrange(len(steps))
    step = steps[reached]
    words = step.request.split(" ")[: rng.randrange(1, 5)]
    working = ", ".join([*(step.text for step in steps[:reached]), " ".join(words)])
    return working, [step.result for step in steps[:reached]] or [step.left]


def situation_of(value: int, operator: Operator, operand: int) -> Situation:
    result = compute(value, operator, operand)
    if value < 0:
        return "is_below_zero"
    if result < 0:
        return "falls_below_zero"
    return "large_operand" if operand >= LARGE else "easy"


def work_out(expression: Expression, writer: Writer, rng: random.Random) -> list[Step]:
    """The working of one writer, with his errors; at least one step."""
    value = expression.operands[0]
    terms = order_terms(expression, writer, rng)
    steps: list[Step] = []
    while terms:
        operator, operand = terms.pop(0)
        habits = writer.habits[situation_of(value, operator, operand)]
        act = draw(habits, rng)
        # Nobody answers without a step: who would stop there takes it.
        if act == "stop" and steps:
            break
        if act == "skip" and not terms and steps:
            break
        if act == "skip" and terms:
            operator, operand = terms.pop(0)
        step = spoil(Step(value, operator, operand, 0), act, expression, steps, rng)
        result = compute(step.left, step.operator, step.right)
        value = near_miss(result, rng) if rng.random() < writer.slips else result
        steps.append(replace(step, result=value))
    if rng.random() < writer.overruns:
        last = steps[-1]
        again = compute(value, last.operator, last.right)
        steps.append(Step(value, last.operator, last.right, again))
    return steps


def order_terms(
    expression: Expression, writer: Writer, rng: random.Random
) -> list[tuple[Operator, int]]:
    """What is to be added and taken away, from left to right or with two neighbours swapped."""
    terms = list(zip(expression.operators, expression.operands[1:], strict=True))
    if len(terms) > 1 and rng.random() < writer.reorders:
        place = rng.randrange(len(terms) - 1)
        terms[place], terms[place + 1] = terms[place + 1], terms[place]
    return terms


def spoil(
    step: Step, act: Act, expression: Expression, before: Sequence[Step], rng: random.Random
) -> Step:
    """The step as written by one who turns it round, flips its sign, or copies a wrong number."""
    left, operator, right = step.left, step.operator, step.right
    if act == "swap":
        left, right = right, left
    elif act == "flip":
        operator = "-" if operator == "+" else "+"
    elif act == "miscopy":
        right = rng.choice([*expression.operands, (right + 1) % 10, (right + 9) % 10])
    elif act == "stale" and before:
        left = before[-1].left
    return replace(step, left=left, operator=operator, right=right)


def near_miss(value: int, rng: random.Random) -> int:
    return rng.choice([value + 1, value - 1, value + 2, value - 2, value + 10, value - 10, -value])


def report(results: Sequence[int], writer: Writer, rng: random.Random) -> int:
    """The number given as the answer: the last result, or what a slip makes of it."""
    if rng.random() >= writer.misreports:
        return results[-1]
    if len(results) > 1 and rng.random() < 0.3:
        return results[-2]
    return near_miss(results[-1], rng)
