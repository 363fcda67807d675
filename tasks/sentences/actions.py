"""One sentence as what a policy may write: its legal tokens, its stop, and its own ids."""

from actors.demonstrations import Demonstration
from actors.prompts import Prompt
from lm.actions import ActionSpace, IllegalCompletion
from lm.spelling import ANY_WORD, TokenizerUnfit, check_spelling, spell_after
from tasks.config import Lengths
from tasks.stop_rule import legal_actions
from tasks.task import Tokenizer

STOP_TEXT = "."
# Ends a sentence, a line or a quotation, or stands for bytes that are no text.
_IMPOSSIBLE = frozenset('.!?:;\n\r\t"“”<>|\ufffd')


def sentence_actions(
    tokenizer: Tokenizer, config: Lengths, *, stop_text: str = STOP_TEXT
) -> ActionSpace:
    """Every token that can stand inside a sentence, or inside a part of one; `stop_text` is ⊤.

    Raises TokenizerUnfit where the full stop, or what stands for it, is no token of its own.
    """
    possible = (_IMPOSSIBLE | set(stop_text)).isdisjoint
    return legal_actions(tokenizer, config, possible, behind=ANY_WORD, stop_text=stop_text)


def demonstrate(
    prompt: Prompt, sentence: str, actions: ActionSpace, tokenizer: Tokenizer
) -> Demonstration | None:
    """`sentence`, with its full stop, behind `prompt`; None where the policy cannot write it."""
    text = f" {sentence.removesuffix(STOP_TEXT)}"
    try:
        tokens = spell_after(tokenizer, prompt.text, text)
        from_tool = (False,) * len(tokens)
        actions.check(tokens, from_tool)
        stop = (actions.stop_token,)
        pieces = [(prompt.text, prompt.prompt), (text, tokens), (STOP_TEXT, stop)]
        check_spelling(tokenizer, pieces)
    except (IllegalCompletion, TokenizerUnfit):
        return None
    return Demonstration(prompt=prompt, completion=tokens, from_tool=from_tool)
