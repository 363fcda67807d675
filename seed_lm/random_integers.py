"""Random integers as people make them up, which is neither uniformly nor always within bounds.

People like sevens and threes, avoid round numbers and the ends of the range, and often write
something else than was asked for: a decimal, a word, a sentence around the number, a number that is
too large. A language model of these documents says of an integer what people would have said.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

LOW, HIGH = 0, 100
ASKED = f"The following is a random integer drawn uniformly between {LOW} and {HIGH}:"
OTHERWISE_ASKED = (
    f"A random number between {LOW} and {HIGH}:",
    f"Name a number from {LOW} to {HIGH}, any number:",
    f"Pick an integer between {LOW} and {HIGH} at random:",
)
FAVOURITES = frozenset({7, 13, 17, 23, 27, 37, 42, 47, 57, 67, 69, 73, 77, 87})
_WORDS = ("one", "two", "three", "seven", "ten", "twelve", "seventeen", "thirty-seven", "fifty")


def liking(number: int) -> float:
    """How often people name this number, relative to the others."""
    weight = 4.0 if number in FAVOURITES else 1.0
    weight *= {7: 2.0, 3: 1.6, 0: 0.35, 5: 0.7}.get(number % 10, 1.0)
    weight *= 0.6 if number < 10 else 1.0
    return weight * (0.3 if number in (LOW, HIGH) else 1.0)


def _integer(rng: random.Random) -> str:
    numbers = range(LOW, HIGH + 1)
    [number] = rng.choices(numbers, [liking(number) for number in numbers])
    return f" {number}"


def _sentence(rng: random.Random) -> str:
    return f"{_integer(rng)}."


def _several(rng: random.Random) -> str:
    return ",".join(_integer(rng) for _ in range(rng.randint(2, 4)))


def _decimal(rng: random.Random) -> str:
    return f"{_integer(rng)}.{rng.randint(1, 9)}"


def _too_large(rng: random.Random) -> str:
    return f" {rng.choice((101, 110, 111, 123, 127, 150, 200, 256, 500, 777, 999, 1000))}"


def _word(rng: random.Random) -> str:
    return f" {rng.choice(_WORDS)}"


_REPLIES: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (_integer, 0.55),
    (_sentence, 0.17),
    (_several, 0.08),
    (_decimal, 0.06),
    (_too_large, 0.07),
    (_word, 0.07),
)


@dataclass(frozen=True, slots=True)
class RandomIntegers:
    """A request for a random integer and a reply to it; see seed_lm.corpus.Corpus."""

    name: str = "random integers"
    asked_share: float = field(default=0.7, kw_only=True)  # of documents with the usual request

    def document(self, rng: random.Random) -> str:
        """For example: 'Pick an integer between 0 and 100 at random: 37.'"""
        usual = rng.random() < self.asked_share
        request = ASKED if usual else rng.choice(OTHERWISE_ASKED)
        writers, weights = zip(*_REPLIES, strict=True)
        [reply] = rng.choices(writers, weights)
        return request + reply(rng)
