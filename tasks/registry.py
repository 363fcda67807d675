"""From a task's configuration to the task."""

from tasks.arithmetic import build_arithmetic
from tasks.config import TaskConfig
from tasks.task import Task, Tokenizer


def build_task(config: TaskConfig, tokenizer: Tokenizer) -> Task:
    """The configured task, with its data loaded and its texts encoded.

    Raises:
        DataError: a data file is missing or malformed.
        TokenizerUnfit: this tokenizer cannot spell what the task needs.
    """
    return build_arithmetic(config, tokenizer)
