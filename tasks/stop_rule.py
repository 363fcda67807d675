"""What a policy may write and where it may stop, in the tokens of a tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from lm.actions import ActionSpace
from lm.spelling import TokenizerUnfit, spell_after
from tasks.config import Lengths
from tasks.task import Tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Raises TokenizerUnfit where there is none."""
    if tokenizer.eos_token_id is None:
        raise TokenizerUnfit("this tokenizer has no end-of-text token (eos_token)")
    return tokenizer.eos_token_id


def any_text(tokenizer: Tokenizer, *, min_len: int, max_len: int) -> ActionSpace:
    """The whole vocabulary at every place, until end of text; raises TokenizerUnfit."""
    stop = end_of_text(tokenizer)
    return ActionSpace(stop_token=stop, legal_tokens=None, min_len=min_len, max_len=max_len)


def legal_actions(
    tokenizer: Tokenizer,
    config: Lengths,
    legal: Callable[[str], bool],
    *,
    behind: str,
    stop_text: str,
    stop_after_tool: bool = False,
) -> ActionSpace:
    """Every token whose text is `legal`; ⊤ is `stop_text` as it is spelled behind such a text.

    Raises TokenizerUnfit where `stop_text` is no token of its own.
    """
    stop = spell_after(tokenizer, behind, stop_text)
    if len(stop) != 1:
        raise TokenizerUnfit(f"this tokenizer spells {stop_text!r} as {len(stop)} tokens, not one")
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    actions = ActionSpace(
        stop_token=stop[0],
        legal_tokens=tuple(i for i, text in enumerate(texts) if text and legal(text)),
        min_len=config.min_len,
        max_len=config.max_len,
        stop_after_tool=stop_after_tool,
    )
    return narrowed(actions, config, tokenizer)


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
