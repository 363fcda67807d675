"""How much texts that were drawn for one question differ."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from rapidfuzz.distance import Levenshtein


def mean_edit_distance(texts: Sequence[str]) -> float | None:
    """Edit distance over the longer one's length, in characters, mean over all pairs: 0 where all
    are equal, 1 where no two share anything. None for fewer than two texts."""
    distances = [
        Levenshtein.normalized_distance(one, other) for one, other in combinations(texts, 2)
    ]
    return float(np.mean(distances)) if distances else None
