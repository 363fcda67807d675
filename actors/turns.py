"""Sampling and learning in turns: what the asynchronous mode is held against."""

import time
from collections.abc import Callable

from actors.protocols import PublishedWeights, WeightSource

_POLL_S = 0.005


class TakingTurns:
    """Gives every published version once, and waits for the next.

    With one actor that stores a batch before it asks (`max_in_flight` 1), and a learner that draws
    just that batch, nobody works while another does.

    Args:
        source: where the newest appears.
        stop: ends a wait.
        timeout_s: longest wait.
    """

    def __init__(
        self, source: WeightSource, stop: Callable[[], bool], *, timeout_s: float = 600.0
    ) -> None:
        self._source = source
        self._stop = stop
        self._timeout_s = timeout_s
        self._begun = False

    def newer_than(self, version: int) -> PublishedWeights | None:
        """The first weights newer than `version`; None at the start, or when stopped.

        Raises:
            TimeoutError: the learner published nothing for `timeout_s`.
        """
        began = time.monotonic()
        while (fresh := self._source.newer_than(version)) is None and self._begun:
            if self._stop():
                break
            if (waited := time.monotonic() - began) > self._timeout_s:
                raise TimeoutError(
                    f"learner: no version after {version} was published within {waited:.0f} s"
                )
            time.sleep(_POLL_S)
        self._begun = True
        return fresh
