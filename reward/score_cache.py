"""Scores remembered by content. Exact: the model is frozen, so an item's scores never change."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


class ScoreMemory:
    """The most recently used scores, at most `capacity` of them. One thread at a time."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._scores: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def recall(self, keys: Iterable[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Scores of those keys that are known."""
        known = {key: self._scores[key] for key in keys if key in self._scores}
        for key in known:
            self._scores.move_to_end(key)
        return known

    def remember(self, scores: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Keep new scores, forgetting those that were not asked for the longest."""
        for key, values in scores.items():
            values.flags.writeable = False
            self._scores[key] = values
        while len(self._scores) > self._capacity:
            self._scores.popitem(last=False)
