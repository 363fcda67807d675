"""Processes without a model that fail as those with one do: their errors are of torch's rooms."""

from typing import Any

from learner.broadcast import Unrecoverable
from reward.replica import ScoreFailed
from tests.light_worker import CountingWorker


class LastWords(CountingWorker):
    """A learner that fails before anybody has heard of its only step."""

    def run(self) -> dict[str, int]:
        """Raise Unrecoverable."""
        raise Unrecoverable("no use")

    def reports_since(self, kind: str, count: int) -> list[Any]:
        """The step, or a warning."""
        reports: dict[str, list[Any]] = {
            "rows": [{"progress/step": 1.0}],
            "events": ["it does not look good"],
        }
        return reports[kind][count:]


class Failing:
    """A reward replica whose passes fail."""

    def score(self, items: list[Any]) -> list[Any]:
        raise ScoreFailed("broken")
