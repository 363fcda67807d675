"""The newest weights of a run, between the learner that publishes them and the actors."""

from typing import Generic

from actors.weight_sources import Data, Published


class StaleWeights(ValueError):
    """Weights were published that are others than those in the store, and no newer."""


class WeightStore(Generic[Data]):
    """Holds the newest adapter; of bytes it is a `WeightSource` and a `WeightSink`."""

    def __init__(self) -> None:
        self._weights: Published[Data] | None = None

    def publish(self, data: Data, *, version: int, checksum: str) -> None:
        """Replace the weights; a version names one set of weights for ever.

        The same may come again: Ray repeats a call whose answer was lost, and a learner that went
        back to a checkpoint begins with its version. One that has lost steps counts on from the
        highest version ever published. Raises StaleWeights.
        """
        held = self._weights
        if held is not None and (version, checksum) == (held.version, held.checksum):
            return
        if held is not None and version <= held.version:
            raise StaleWeights(
                f"weights of version {version} were offered, but the weight store holds version "
                f"{held.version}; a version never names other weights"
            )
        self._weights = Published(version=version, data=data, checksum=checksum)

    def newer_than(self, version: int) -> Published[Data] | None:
        """The newest weights if they are newer than `version`, else None."""
        if self._weights is None or self._weights.version <= version:
            return None
        return self._weights
