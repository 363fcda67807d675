"""Worked examples in front of a question: how a language model is asked without being trained."""

import random

from actors.prompts import Prompt
from tasks.task import Task, Tokenizer


class TooFewDemonstrations(ValueError):
    """More worked examples were asked for than the task has."""


def worked_examples(task: Task, tokenizer: Tokenizer, *, count: int, seed: int) -> tuple[int, ...]:
    """Token ids of `count` of the task's demonstrations, X Z Y and a new line each.

    Where there is no Y, or X shows it, ⊤ in its stead.

    Args:
        seed: chooses which ones, and their order.
    """
    known = task.demonstrations
    if count > len(known):
        raise TooFewDemonstrations(
            f"{count} worked examples asked for (compare.shots, evaluation.shots), but task "
            f"{task.name!r} has {len(known)} demonstrations: ask for fewer"
        )
    newline = tokenizer.encode("\n", add_special_tokens=False)
    return tuple(
        token
        for shown in random.Random(seed).sample(list(known), count)
        for token in (
            *shown.prompt.prompt,
            *shown.completion,
            *_behind(task, shown.prompt),
            *newline,
        )
    )


def _behind(task: Task, prompt: Prompt) -> tuple[int, ...]:
    """What follows Z: Y; or ⊤ alone where there is no Y, or the policy was shown it with X."""
    shown_before = prompt.scored is not None or not prompt.answer
    return (task.actions.stop_token,) if shown_before else prompt.answer
