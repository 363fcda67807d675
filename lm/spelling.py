"""Text as token ids, as the model reads it, and back: what stands in front, how pieces join.

A tokenizer may put a start token in front of a text (Gemma, Llama), and may spell a piece otherwise
by itself than behind other text (a space in front of the first word; a full stop behind a word).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lm.config import LMConfig
from lm.hub import ModelUnusable

Pieces = Sequence[tuple[str, tuple[int, ...]]]  # texts in their order, each with its token ids

Decode = Callable[[list[int]], str]
# Tokens before a cut that are decoded with what follows it: more than any character or the space
# of a word has.
_CONTEXT = 16
# Stands before a piece whose own beginning is not known, such as a full stop behind any word.
ANY_WORD = " It"


class TokenizerUnfit(ValueError):
    """A tokenizer that cannot spell what a task needs as it needs it."""


def text_prefix(config: LMConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that stand in front of every text that the model reads, by `lm.bos`.

    Raises ModelUnusable where a start token is wanted that the tokenizer has not.
    """
    if config.bos is False:
        return ()
    if config.bos is True:
        if tokenizer.bos_token_id is None:
            raise ModelUnusable(
                f"lm.bos is true, but the tokenizer of model {config.model!r} has no start token "
                "(bos_token); set lm.bos to 'auto' or false"
            )
        return (int(tokenizer.bos_token_id),)
    return _own_prefix(tokenizer)


def _own_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that the tokenizer itself puts in front of a text."""
    bare = tokenizer.encode(ANY_WORD, add_special_tokens=False)
    whole = tokenizer.encode(ANY_WORD)
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def spell(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text from its beginning; the start token, which every model adds, left out."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def spell_after(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> tuple[int, ...]:
    """Token ids of `text` as it stands behind `before`.

    Raises TokenizerUnfit where the two are not spelled one after the other.
    """
    head, whole = spell(tokenizer, before), spell(tokenizer, before + text)
    if whole[: len(head)] != head:
        raise TokenizerUnfit(
            f"this tokenizer spells {before[-30:] + text[:30]!r} as pieces that run across the "
            f"seam between {before[-30:]!r} and {text[:30]!r}; take another base, or other texts"
        )
    return whole[len(head) :]


def chat_text(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """A user's message in the tokenizer's chat template, up to where the assistant's turn begins.

    Without the start token that every text gets in front. Raises TokenizerUnfit where there is no
    template.
    """
    if not tokenizer.chat_template:
        raise TokenizerUnfit(
            "this tokenizer has no chat template: set task.chat to false, or take a base that was "
            "tuned for chats"
        )
    said: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return said.removeprefix(tokenizer.decode(_own_prefix(tokenizer)))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that stand for no text: ends, paddings, marks of a chat."""
    return frozenset(at for at, token in tokenizer.added_tokens_decoder.items() if token.special)


def check_spelling(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> None:
    """Raise TokenizerUnfit unless the pieces, put together, spell the text that they make."""
    text = "".join(piece for piece, _ in pieces)
    together = tuple(token for _, tokens in pieces for token in tokens)
    if spell(tokenizer, text) != together:
        parts = " | ".join(repr(piece[-30:]) for piece, _ in pieces)
        raise TokenizerUnfit(
            f"this tokenizer spells the pieces {parts} otherwise than the text that they make: the "
            "model would be trained on a spelling that it does not know; take another base, or "
            "other texts"
        )


class Piece(NamedTuple):
    """A stretch of a rationale that one side wrote."""

    text: str
    from_tool: bool


def split_pieces(
    tokens: Sequence[int], from_tool: Sequence[bool], decode: Decode
) -> tuple[Piece, ...]:
    """The text, cut where the writer changes."""
    written = stretches(from_tool)
    texts = split_text(tokens, [end for _, _, end in written], decode)
    pairs = zip(texts, written, strict=True)
    return tuple(Piece(text, by_tool) for text, (by_tool, _, _) in pairs if text)


def stretches(from_tool: Sequence[bool]) -> list[tuple[bool, int, int]]:
    """Stretches of one writer: whether it is the tool, and the tokens before and up to its end."""
    runs = [(by_tool, len(list(marks))) for by_tool, marks in groupby(from_tool)]
    ends = accumulate(length for _, length in runs)
    return [(by_tool, end - length, end) for (by_tool, length), end in zip(runs, ends, strict=True)]


def split_text(tokens: Sequence[int], ends: Sequence[int], decode: Decode) -> list[str]:
    """The text of tokens, cut after each of the rising numbers of tokens `ends`.

    Tokens are decoded with some of those before them, on which their text may depend: the space
    of a first word, the bytes of one character.
    """
    texts = []
    for last, end in pairwise([0, *ends]):
        start = max(0, last - _CONTEXT)
        before = decode(list(tokens[start:last])) if last else ""
        texts.append(decode(list(tokens[start:end]))[len(before) :])
    return texts
