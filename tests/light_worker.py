"""Processes with a worker's life, or a reward replica's, and no model in them.

What needs torch for its errors alone is in tests/light_failures.py: many processes start from here.
"""

import os
import threading
from typing import Any

from reward.verifiers import CheckFailed


class LightWorker:
    """Meets, starts, and runs until stopped."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    def rendezvous(self) -> None:
        """Nowhere."""

    def start(self, _: None) -> None:
        """Nothing to build."""

    def progress(self) -> int:
        """Nothing is loaded."""
        return 0

    def run(self) -> dict[str, int]:
        """Wait for `stop`."""
        self._stopping.wait()
        return {}

    def status(self) -> dict[str, int]:
        """No counters."""
        return {}

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping.set()


class CountingWorker(LightWorker):
    """Counts what only its last answer holds: whether it was stopped."""

    def run(self) -> dict[str, int]:
        """Wait for `stop`."""
        super().run()
        return {"stopped": 1}

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()


class DeafWorker(CountingWorker):
    """Does not end when it is asked to."""

    def stop(self) -> None:
        """Go on."""


class BrokenWorker(CountingWorker):
    """Cannot start."""

    def start(self, _: None) -> None:
        """Raise OSError."""
        raise OSError("no such model")


class UnjudgedWorker(CountingWorker):
    """An actor whose verifier fails always."""

    def run(self) -> dict[str, int]:
        """Raise CheckFailed."""
        raise CheckFailed("reward.terms: 8 of 8 checks failed")


class Answering:
    """A reward replica that answers."""

    def score(self, items: list[Any]) -> list[Any]:
        return ["scores"]
