"""Tools that speak into a rationale while it is being sampled: a calculator."""

import re
from collections.abc import Sequence

from lm.spelling import spell_after
from tasks.task import Tokenizer

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
        texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
        self.triggers = frozenset(token for token, text in enumerate(texts) if text.endswith("="))

    def output(self, completion: Sequence[int]) -> list[int]:
        """Token ids of ' result' for a completion that ends in an expression; [] for any other."""
        expression = self._tokenizer.decode(list(completion)).rpartition(",")[2]
        match = _TWO_TERMS.fullmatch(expression)
        if match is None:
            return []
        left, right = int(match[1]), int(match[3])
        result = left + right if match[2] == "+" else left - right
        return list(spell_after(self._tokenizer, expression, f" {result}"))
