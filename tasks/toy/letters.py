"""The toy's alphabet, and a tool that adds its letters up."""

from collections.abc import Sequence

LETTERS = "abcd"


class LetterSum:
    """Writes the sum of the letters so far behind '=', a = 0 to d = 3, modulo 4.

    Keeps silent where no letter precedes. Args are token ids.
    """

    def __init__(self, letters: Sequence[int], *, trigger: int) -> None:
        self._letters = list(letters)
        self.triggers = frozenset((trigger,))

    def output(self, completion: Sequence[int]) -> list[int]:
        """One letter, or nothing; see lm.sampling.Tool."""
        values = [self._letters.index(token) for token in completion if token in self._letters]
        return [self._letters[sum(values) % len(self._letters)]] if values else []
