"""How many calls a process holds, so that it can go when nobody waits for it any more."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class HeldCalls:
    """Counts calls from any number of threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._number = 0
        self._last_s = float("-inf")  # of the monotonic clock

    @contextmanager
    def one(self) -> Iterator[None]:
        """For as long as one call lasts."""
        with self._lock:
            self._number += 1
        try:
            yield
        finally:
            with self._lock:
                self._number -= 1
                self._last_s = time.monotonic()

    def quiet_s(self) -> float:
        """Seconds since the last call ended: 0 while one is held, infinite before the first."""
        with self._lock:
            return 0.0 if self._number else time.monotonic() - self._last_s
