"""How near a written sentence is to the true one, and how far sentences are from one another.

NLTK is imported by who measures: it takes half a second, which no other process of a run has to.
"""

import re
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from rapidfuzz.distance import Levenshtein

# [N] and [N] sentences -> [N] likeness of each pair in [-1, 1].
Likeness = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
_WORD = re.compile(r"[^\W_]+|[^\w\s]")


def words(sentence: str) -> list[str]:
    """Words and marks in lower case."""
    return _WORD.findall(sentence.lower())


def bleu4(written: str, true: str) -> float:
    """Sentence BLEU of n-grams up to 4, in [0, 1]; an order without a match counts 0.1 matches."""
    return _bleu4(words(written), [words(true)]) if words(written) else 0.0


def self_bleu4(sentences: Sequence[str]) -> float | None:
    """How much sentences repeat one another: mean BLEU-4 of each against all others, in [0, 1].

    None for fewer than two. Zhu et al. 2018 (Texygen, arXiv 1802.01886); smoothed as `bleu4`.
    """
    if len(sentences) < 2:
        return None
    texts = [words(sentence) for sentence in sentences]
    others = (texts[:at] + texts[at + 1 :] for at in range(len(texts)))
    bleu = [_bleu4(text, rest) for text, rest in zip(texts, others, strict=True) if text]
    return sum(bleu) / len(texts)


def _bleu4(text: list[str], references: list[list[str]]) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1
    return float(sentence_bleu(references, text, smoothing_function=smoothing))


def gleu4(written: str, true: str) -> float:
    """Sentence GLEU: the lesser of precision and recall of n-grams up to 4, in [0, 1]."""
    from nltk.translate.gleu_score import sentence_gleu

    return float(sentence_gleu([words(true)], words(written))) if words(written) else 0.0


def word_distance(one: str, other: str) -> float:
    """Edit distance in words over the longer one's length, in [0, 1]."""
    return float(Levenshtein.normalized_distance(words(one), words(other)))


def diversity(sentences: Sequence[str], likeness: Likeness | None) -> float:
    """Mean distance of two of the sentences: 1 - likeness, or by words; 0 for fewer than two."""
    if len(sentences) < 2:
        return 0.0
    ones, others = zip(*combinations(sentences, 2), strict=True)
    if likeness is None:
        return float(np.mean(list(map(word_distance, ones, others))))
    return 1 - float(np.mean(likeness(ones, others)))
