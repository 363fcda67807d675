"""Worked examples in front of a question: how a language model is asked without being trained."""

import random
from collections.abc import Sequence

from actors.prompts import Prompt
from lm.spelling import spell_after
from tasks.task import Task, Tokenizer

Tokens = tuple[int, ...]


class TooFewDemonstrations(ValueError):
    """More worked examples were asked for than the task has."""


def worked_examples(task: Task, tokenizer: Tokenizer, *, count: int, seed: int) -> Tokens:
    """Token ids of `count` of the task's demonstrations, X Z Y and a new line each.

    Where there is no Y, or the policy was shown it with X, ⊤ in its stead.

    Args:
        seed: chooses which ones, and their order.
    """
    stop = (task.actions.stop_token,)

    def behind(x: Prompt) -> Tokens:
        return stop if x.scored is not None or not x.answer else x.answer

    known = [(*d.prompt.prompt, *d.completion, *behind(d.prompt)) for d in task.demonstrations]
    has = f"task {task.name!r} has {len(known)} demonstrations"
    return _chosen(known, has, tokenizer, count, seed)


def answered_examples(task: Task, tokenizer: Tokenizer, *, count: int, seed: int) -> Tokens:
    """The same of questions that have an answer and no rationale: X Y and a new line each."""
    known = [(*d.prompt.prompt, *d.completion) for d in task.answered]
    has = f"task {task.name!r} has {len(known)} answered questions"
    return _chosen(known, has, tokenizer, count, seed)


def _chosen(
    known: Sequence[Tokens], has: str, tokenizer: Tokenizer, count: int, seed: int
) -> Tokens:
    if count > len(known):
        raise TooFewDemonstrations(
            f"{count} worked examples asked for (compare.shots, evaluation.shots), but {has}: ask "
            "for fewer"
        )
    if not count:
        return ()
    newline = spell_after(tokenizer, ".", "\n")
    chosen = random.Random(seed).sample(list(known), count)
    return tuple(token for text in chosen for token in (*text, *newline))
