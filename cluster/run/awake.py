"""Seconds during which this process ran, for deadlines of others.

A driver that was itself stopped (SIGSTOP, a suspended machine) has heard nothing meanwhile: its
parts' answers are yet to be looked at when it goes on, and no part was silent.
"""

import threading
import time

_BEAT_S = 0.5
_STOPPED_S = 5.0  # a busy machine delays a beat by less


class AwakeClock:
    """A monotonic clock that leaves out the time for which its process was stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._beat_s = time.monotonic()
        self._stopped_s = 0.0
        threading.Thread(target=self._run, name="awake", daemon=True).start()

    def now_s(self) -> float:
        with self._lock:
            return self._note_gap() - self._stopped_s

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            with self._lock:
                self._beat_s = self._note_gap()

    def _note_gap(self) -> float:
        """The monotonic clock; a long time without a beat is counted as stopped, once."""
        now = time.monotonic()
        if (gap_s := now - self._beat_s) > _STOPPED_S:
            self._stopped_s += gap_s
            self._beat_s = now
        return now


awake_s = AwakeClock().now_s  # of this process
