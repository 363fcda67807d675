"""The protocols between a driver and what it drives: a run over Ray, or one in this process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from buffer.memory import MemoryStore
from buffer.stats import ReplayStats
from tasks.evaluation.evaluation import Evaluation


class Run(Protocol):
    """A run as its driver sees it."""

    learner_rows: list[dict[str, float]]  # metrics of steps; the driver takes them away

    @property
    def finished(self) -> bool:
        """Whether the learner has done its steps."""

    @property
    def settled(self) -> bool:
        """Whether all parts that are wanted run, and no others."""

    @property
    def given_up(self) -> str:
        """Why parts that the last `scale` added were given up; empty if none were."""

    @property
    def learner_status(self) -> Mapping[str, Any]:
        """Step and version; empty before the learner has come up."""

    def tick(self) -> None:
        """Do or watch a little."""

    def scale(self, *, actors: int | None = None, replicas: int | None = None) -> None:
        """Have these numbers from now on; raises UserError."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Desired and actual numbers of actors and replicas."""

    def actor_totals(self) -> dict[str, float]:
        """Counters summed over all actors."""

    def record_metrics(self, learner: Mapping[str, float], buffer: ReplayStats) -> None:
        """Hand metrics to Prometheus."""

    def stop(self, timeout_s: float) -> list[str]:
        """Stop in order; names of the parts that had to be killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferAddress:
    """Where the run's buffer is: in a Redis or, where `memory` is one, in this process."""

    url: str = ""
    password: str | None = field(default=None, repr=False)
    memory: MemoryStore | None = None


class PendingMeasurement(Protocol):
    """An evaluation under way."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> Evaluation:
        """Wait for it, until its deadline; raises what the evaluation raised."""


class Session(Protocol):
    """Brings a run up and takes it down."""

    address: str  # of the Ray cluster; empty without Ray
    in_process: bool  # whether `start` and `evaluate` do their work before they return

    def open(self) -> None:
        """Get what every run needs, before any part of it starts."""

    def start(self, report: Callable[[str], None], stop: Callable[[], bool]) -> Run:
        """Start every part of the run; `stop` ends waits of parts in this process."""

    def evaluate(
        self,
        adapter: Path | None,
        report: Callable[[str], None],
        progress: Callable[[str], None],
        *,
        step: int,
    ) -> PendingMeasurement:
        """Begin to measure the base (None) or an adapter after that many optimizer steps.

        Args:
            report: takes a line that stays.
            progress: is told what is being done, again and again.
        """

    def close(self) -> None:
        """Leave nothing behind."""
