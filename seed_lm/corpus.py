"""What the seed LM reads: documents drawn from corpora, one corpus per kind of text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class Corpus(Protocol):
    """A kind of text, generated: an endless stream of independent documents."""

    @property
    def name(self) -> str: ...

    def document(self, rng: random.Random) -> str:
        """One document, without the end-of-text token, from the generator's next numbers."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """How often a mixture draws from a corpus, relative to its other corpora."""

    corpus: Corpus
    weight: float


def documents(shares: Sequence[Share], seed: str) -> Iterator[str]:
    """Endless documents of the mixture, the same ones for the same seed on every machine."""
    rng = random.Random(seed)
    corpora = [share.corpus for share in shares]
    weights = [share.weight for share in shares]
    while True:
        [corpus] = rng.choices(corpora, weights)
        yield corpus.document(rng)
