"""Generates the shipped arithmetic questions: `python -m seed_lm.arithmetic_files`.

Training questions have three or four operands. Questions to validate and to test on are those that
the seed LM's corpus holds out, so neither the base LM nor its fine-tuning has met them. Beside them
stand all questions of two operands, whose posterior can be enumerated.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from seed_lm.worked_sums import OPERATORS, draw_expression, is_held_out
from tasks.arithmetic.data import Item
from tasks.arithmetic.expression import Expression, answer_text

FOLDER = Path(__file__).parent.parent / "tasks" / "data" / "arithmetic"
TRAINING_OPERANDS = (3, 4)
TEST_OPERANDS = (3, 4, 5)
NUM_DEMONSTRATIONS = 50
NUM_QUESTIONS = 1000
NUM_TESTS = 500  # of each number of operands ...
NUM_VALIDATION = 100  # ... and as many of each to make choices on
NUM_WORKED_PAIRS = 20  # of the 200 questions of two operands


def write_files(folder: Path, seed: int) -> None:
    """Write all files; the same for the same seed."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    training = _distinct(
        NUM_DEMONSTRATIONS + NUM_QUESTIONS,
        lambda: draw_expression(rng.choice(TRAINING_OPERANDS), rng),
        held_out=False,
    )
    _write(folder / "demonstrations.json", _worked(training[:NUM_DEMONSTRATIONS]))
    _write(folder / "questions.json", _unworked(training[NUM_DEMONSTRATIONS:]))
    for operands in TEST_OPERANDS:
        tested = _distinct(NUM_TESTS, partial(draw_expression, operands, rng), held_out=True)
        _write(folder / f"test_{operands}.json", _unworked(tested))
        own = random.Random(f"{seed} validation {operands}")
        draw = partial(draw_expression, operands, own)
        validated = _distinct(NUM_VALIDATION, draw, held_out=True, other_than=tested)
        _write(folder / f"validation_{operands}.json", _unworked(validated))
    pairs = [
        Expression((left, right), (operator,))
        for left in range(10)
        for operator in OPERATORS
        for right in range(10)
    ]
    rng.shuffle(pairs)
    _write(folder / "worked_pairs.json", _worked(pairs[:NUM_WORKED_PAIRS]))
    _write(folder / "pairs.json", _unworked(pairs[NUM_WORKED_PAIRS:]))


def _distinct(
    count: int,
    draw: Callable[[], Expression],
    *,
    held_out: bool,
    other_than: Sequence[Expression] = (),
) -> list[Expression]:
    found: dict[str, Expression] = {}
    known = set(other_than)
    while len(found) < count:
        expression = draw()
        if is_held_out(expression) == held_out and expression not in known:
            found[expression.text] = expression
    return list(found.values())


def _worked(expressions: Sequence[Expression]) -> list[Item]:
    return [
        Item(each, each.value, tuple(step.request for step in each.steps)) for each in expressions
    ]


def _unworked(expressions: Sequence[Expression]) -> list[Item]:
    return [Item(expression, expression.value, None) for expression in expressions]


def _record(item: Item) -> dict[str, str | int]:
    """As files have it, see `tasks.arithmetic.data`."""
    worked = {} if item.steps is None else {"str_rationale": ", ".join(item.steps)}
    return {
        "str_query": item.expression.question,
        "num_sol": item.answer,
        **worked,
        "str_sol": answer_text(item.answer),
    }


def _write(path: Path, items: Sequence[Item]) -> None:
    lines = ",\n".join(json.dumps(_record(item)) for item in items)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seed_lm.arithmetic_files", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    arguments = parser.parse_args()
    write_files(arguments.out, arguments.seed)
    print(f"wrote {NUM_DEMONSTRATIONS} + {NUM_QUESTIONS} training questions and {NUM_TESTS} tests")


if __name__ == "__main__":
    main()
