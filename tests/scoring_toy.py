"""Reward replicas as processes, in a module of their own that workers can import."""

from typing import Any

from reward.replica import ScoreFailed


class Failing:
    """A reward replica whose passes fail."""

    def score(self, items: list[Any]) -> list[Any]:
        raise ScoreFailed("broken")


class Answering:
    """One that answers."""

    def score(self, items: list[Any]) -> list[Any]:
        return ["scores"]
