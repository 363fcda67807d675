"""From a task's configuration to the task."""

from collections.abc import Callable
from typing import Any

from tasks.arithmetic.task import build_arithmetic
from tasks.config import SubjectivityConfig, TaskConfig
from tasks.custom import CustomTask, build_own
from tasks.questions.task import build_questions
from tasks.random_number import build_random_number
from tasks.sentences.continuation import build_continuation
from tasks.sentences.infilling import build_infilling
from tasks.subjectivity.task import build_subjectivity
from tasks.task import Task, Tokenizer
from tasks.toy.task import build_toy

_BUILDERS: dict[str, Callable[[Any, Tokenizer], Task]] = {
    "arithmetic": build_arithmetic,
    "continuation": build_continuation,
    "infilling": build_infilling,
    "questions": build_questions,
    "random_number": build_random_number,
    "toy": build_toy,
}


def build_task(config: TaskConfig, tokenizer: Tokenizer, *, seed: int) -> Task:
    """The configured task, with its data loaded and its texts encoded.

    Args:
        seed: the run's, of what is drawn of the data.

    Raises:
        DataError: a data file is missing or malformed.
        TokenizerUnfit: this tokenizer cannot spell what the task needs.
        UnfitTask: a user's task that no run could work on.
    """
    if isinstance(config, CustomTask):
        return build_own(config, tokenizer)
    if isinstance(config, SubjectivityConfig):
        return build_subjectivity(config, tokenizer, seed=seed)
    return _BUILDERS[config.name](config, tokenizer)
