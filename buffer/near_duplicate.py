"""When two completions of one prompt are too alike to keep both."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist


def near_duplicates(
    rows: Sequence[NDArray[np.int32]], columns: Sequence[NDArray[np.int32]], *, tolerance: float
) -> NDArray[np.bool_]:
    """Which pairs have a token edit distance below tolerance * (sum of their lengths).

    The rule of Hu et al. 2024 (their released buffer, tolerance 0.25). Symmetric; with tolerance 0
    no pair is near, not even of equal completions.

    Args:
        rows: N completions, token ids below 2**20.
        columns: M completions.

    Returns:
        [N, M] bool.
    """
    if not rows or not columns or tolerance == 0:
        return np.zeros((len(rows), len(columns)), np.bool_)
    lengths = np.add.outer([row.size for row in rows], [column.size for column in columns])
    limit = tolerance * lengths
    distance = cdist(
        [as_text(row) for row in rows],
        [as_text(column) for column in columns],
        scorer=Levenshtein.distance,
        # Beyond the loosest limit the exact distance is of no use and costs time.
        score_cutoff=int(np.ceil(limit.max())),
        dtype=np.int32,
    )
    near: NDArray[np.bool_] = distance < limit
    return near


def as_text(tokens: NDArray[np.int32]) -> str:
    """Tokens as code points, the form that rapidfuzz compares without hashing each token."""
    return tokens.astype("<i4", copy=False).tobytes().decode("utf-32-le", "surrogatepass")
