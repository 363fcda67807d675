"""Worked examples in front of a question: how a language model is asked without being trained."""

import random
from collections.abc import Sequence

from actors.prompts import Prompt
from lm.spelling import spell_after
from tasks.task import AnsweredTask, Task, Tokenizer

Tokens = tuple[int, ...]


class TooFewDemonstrations(ValueError):
    """More worked examples were asked for than the task has."""


def worked_examples(task: Task, tokenizer: Tokenizer, *, count: int, seed: int) -> Tokens:
    """Token ids of `count` of the task's demonstrations, X Z Y and a new line each.

    Where there is no Y, or X shows it, ⊤ in its stead.

    Args:
        seed: chooses which ones, and their order.
    """
    known = [
        (*d.prompt.prompt, *d.completion, *_behind(task, d.prompt)) for d in task.demonstrations
    ]
    _check(count, f"task {task.name!r} has {len(known)} demonstrations", len(known))
    return _chosen(known, tokenizer, count, seed)


def answered_examples(task: AnsweredTask, tokenizer: Tokenizer, *, count: int, seed: int) -> Tokens:
    """The same of questions that have an answer and no rationale: X Y and a new line each."""
    known = [(*d.prompt.prompt, *d.completion) for d in task.answered]
    _check(count, f"task {task.name!r} has {len(known)} answered questions", len(known))
    return _chosen(known, tokenizer, count, seed)


def _check(count: int, has: str, number: int) -> None:
    if count > number:
        raise TooFewDemonstrations(
            f"{count} worked examples asked for (compare.shots, evaluation.shots), but {has}: ask "
            "for fewer"
        )


def _chosen(known: Sequence[Tokens], tokenizer: Tokenizer, count: int, seed: int) -> Tokens:
    newline = spell_after(tokenizer, ".", "\n")
    chosen = random.Random(seed).sample(list(known), count)
    return tuple(token for text in chosen for token in (*text, *newline))


def _behind(task: Task, prompt: Prompt) -> Tokens:
    """What follows Z: Y; or ⊤ alone where there is no Y, or the policy was shown it with X."""
    shown_before = prompt.scored is not None or not prompt.answer
    return (task.actions.stop_token,) if shown_before else prompt.answer
