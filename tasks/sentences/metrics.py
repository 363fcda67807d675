"""How near a written sentence is to the true one, and how far sentences are from one another."""

import re
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from rapidfuzz.distance import Levenshtein

# [N] and [N] sentences -> [N] likeness of each pair in [-1, 1].
Likeness = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
_WORD = re.compile(r"[^\W_]+|[^\w\s]")


def words(sentence: str) -> list[str]:
    """Words and marks in lower case."""
    return _WORD.findall(sentence.lower())


def bleu4(written: str, true: str) -> float:
    """Sentence BLEU of n-grams up to 4, in [0, 1]; an order without a match counts 0.1 matches."""
    if not words(written):
        return 0.0
    smoothing = SmoothingFunction().method1
    return float(sentence_bleu([words(true)], words(written), smoothing_function=smoothing))


def self_bleu4(sentences: Sequence[str]) -> float | None:
    """How much sentences repeat one another: mean BLEU-4 of each against all others, in [0, 1].

    None for fewer than two. Zhu et al. 2018 (Texygen, arXiv 1802.01886); smoothed as `bleu4`.
    """
    if len(sentences) < 2:
        return None
    smoothing = SmoothingFunction().method1
    texts = [words(sentence) for sentence in sentences]
    bleu = [
        sentence_bleu(texts[:at] + texts[at + 1 :], text, smoothing_function=smoothing)
        for at, text in enumerate(texts)
        if text
    ]
    return float(sum(bleu) / len(texts))


def gleu4(written: str, true: str) -> float:
    """Sentence GLEU: the lesser of precision and recall of n-grams up to 4, in [0, 1]."""
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
