"""Worked examples in front of a question: how a language model is asked without being trained."""

import random
from itertools import chain

from actors.prompts import Prompt
from lm.spelling import spell_after
from tasks.task import Task, Tokenizer

Tokens = tuple[int, ...]


class TooFewDemonstrations(ValueError):
    """More worked examples were asked for than the task has."""


def worked_examples(task: Task, tokenizer: Tokenizer, *, count: int, seed: int) -> Tokens:
    """Token ids of `count` of the task's demonstrations, X Z Y and a new line each.

    Where there is no Y, or the policy was shown it with X, ⊤ in its stead. Of a task whose
    questions have answers and no rationales, X Y.

    Args:
        seed: chooses which ones, and their order.
    """
    stop = (task.actions.stop_token,)

    def behind(x: Prompt) -> Tokens:
        if task.answered:
            return ()
        return stop if x.scored is not None or not x.answer else x.answer

    known = task.answered or task.demonstrations
    if count > len(known):
        raise TooFewDemonstrations(
            f"{count} worked examples asked for (compare.shots, evaluation.shots), but task "
            f"{task.name!r} has {len(known)} "
            f"{'answered questions' if task.answered else 'demonstrations'}: ask for fewer"
        )
    if not count:
        return ()
    newline = spell_after(tokenizer, ".", "\n")
    chosen = random.Random(seed).sample(known, count)
    texts = ((*d.prompt.prompt, *d.completion, *behind(d.prompt), *newline) for d in chosen)
    return tuple(chain.from_iterable(texts))
