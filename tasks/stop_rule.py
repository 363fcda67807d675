"""Where a policy may stop, as a task's configuration narrows it: `stop_every`, `stop_behind`."""

from collections.abc import Sequence
from dataclasses import replace

from lm.actions import ActionSpace
from lm.spelling import TokenizerUnfit
from tasks.config import Lengths
from tasks.task import Tokenizer


def narrowed(actions: ActionSpace, config: Lengths, tokenizer: Tokenizer) -> ActionSpace:
    """`actions` with fewer stop states, where `config` asks for that.

    Raises TokenizerUnfit where no token that the policy may choose ends with one of the texts.
    """
    behind = None
    if config.stop_behind:
        behind = frozenset().union(
            *(_ending_with(text, actions, tokenizer) for text in config.stop_behind)
        )
    return replace(actions, stop_behind=behind, stop_every=config.stop_every)


def _ending_with(text: str, actions: ActionSpace, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end with `text`, chosen or a tool's."""
    found = frozenset(
        token for token in range(len(tokenizer)) if tokenizer.decode([token]).endswith(text)
    )
    legal: Sequence[int] = range(len(tokenizer))
    if actions.legal_tokens is not None:
        legal = actions.legal_tokens
    if not found.intersection(legal) - {actions.stop_token}:
        raise TokenizerUnfit(
            f"task.stop_behind: no token that this task's policy may choose ends with {text!r}; "
            "name a text at which a token ends (most tokenizers put a space before a word)"
        )
    return found
