"""Tools that speak into a rationale while it is being sampled: a calculator behind "=", or a
function of somebody's own behind any text."""

import os
import re
from collections.abc import Collection, Sequence

from lm.spelling import spell, spell_after
from lm.tools import ToolFailed, TriggerText
from reward.verifiers import CheckPool, Failure
from tasks.task import Tokenizer

_MOST_PROCESSES = 4  # that call one function
MAX_DIGITS = 9  # of an operand: what is longer is no sum that a rationale needs
# Digits are ASCII: a model may write others, which int() would take too.
_TWO_TERMS = re.compile(rf" ?(-?[0-9]{{1,{MAX_DIGITS}}}) ([+-]) (-?[0-9]{{1,{MAX_DIGITS}}}) ?=")


class Calculator:
    """Writes the result behind 'a + b =' or 'a - b =', and keeps silent after anything else.

    The expression is what stands after the last comma, with exactly two terms: the sum of three is
    refused, so that planning the steps stays the policy's task (Hu et al. 2024, section 4.4).
    The text is matched, never evaluated.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.triggers = _equals_signs(tokenizer)

    def output(self, completion: Sequence[int]) -> list[int]:
        """Token ids of ' result' for a completion that ends in an expression; [] for any other."""
        expression = self._tokenizer.decode(list(completion)).rpartition(",")[2]
        match = _TWO_TERMS.fullmatch(expression)
        if match is None:
            return []
        left, right = int(match[1]), int(match[3])
        result = left + right if match[2] == "+" else left - right
        return list(spell_after(self._tokenizer, expression, f" {result}"))


class FunctionTool:
    """Writes what `name`, a "module:function", returns for the text of a rationale so far, or
    nothing where that is "" or None.

    What it says must follow from the text: it is part of the state, with probability 1. It runs in
    processes of its own, and one is ended where a call takes longer than `deadline_s`, which does
    not count the wait for a free process.
    """

    def __init__(
        self, tokenizer: Tokenizer, name: str, *, behind: str | None = None, deadline_s: float
    ) -> None:
        """`behind`: the text that calls it; None: any token that ends with "="."""
        self._tokenizer, self._name = tokenizer, name
        self.triggers: Collection[int] = (
            _equals_signs(tokenizer) if behind is None else TriggerText(tokenizer, behind)
        )
        processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
        self._pool = CheckPool(
            [(name, None)], _as_text, given=("text",), processes=processes, deadline_s=deadline_s
        )

    def check(self) -> None:
        """Raise UnusableCheck where there is no such function."""
        self._pool.start()

    def output(self, completion: Sequence[int]) -> list[int]:
        """Token ids of the text to insert; raises ToolFailed."""
        said = self._pool.make((0, self._tokenizer.decode(list(completion))))
        if isinstance(said, Failure):
            raise ToolFailed(f"task.tools: {said.reason}")
        return list(spell(self._tokenizer, said))


def _as_text(value: object) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"a tool returned {value!r:.60}, which is no text")
    return value or ""


def _equals_signs(tokenizer: Tokenizer) -> frozenset[int]:
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    return frozenset(token for token, text in enumerate(texts) if text.endswith("="))
