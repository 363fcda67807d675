"""What a run's processes must agree on: the newest weights and the reward replicas that live.

One small process that needs no model: the learner publishes, actors ask. A board that was
restarted is empty until the learner's next publication and the supervisor's next notice; nobody
waits for either.
"""

from actors.protocols import PublishedWeights


class StaleWeights(ValueError):
    """Weights were published that are others than those on the board, and no newer."""


class WeightBoard:
    """Holds the newest adapter and the names of the reward replicas."""

    def __init__(self) -> None:
        self._weights: PublishedWeights | None = None
        self._replicas: tuple[str, ...] = ()

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        """Replace the weights.

        The same may come again: Ray repeats a call whose answer was lost, and a learner that went
        back to the checkpoint of just this version begins with it.

        Raises:
            StaleWeights: `version` is below the one on the board, or names other weights there. A
                version names one set of weights for ever, so a learner that has lost its last
                steps goes on counting from the highest version ever published.
        """
        held = self._weights
        if held is not None and (version, checksum) == (held.version, held.checksum):
            return
        if held is not None and version <= held.version:
            raise StaleWeights(
                f"weights of version {version} were offered, but the board holds version "
                f"{held.version}; a version never names other weights"
            )
        self._weights = PublishedWeights(version=version, data=data, checksum=checksum)

    def newer_than(self, version: int) -> PublishedWeights | None:
        """The newest weights if they are newer than `version`, else None."""
        if self._weights is None or self._weights.version <= version:
            return None
        return self._weights

    def announce_replicas(self, names: tuple[str, ...]) -> None:
        """Say which reward replicas answer now."""
        self._replicas = names

    def replicas(self) -> tuple[str, ...]:
        """Names of the reward replicas that answer now; empty while none does."""
        return self._replicas
