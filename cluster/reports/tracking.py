"""A run's figures on their way to trackers, in threads that no run waits for.

`metrics.jsonl` stays the source. A tracker that fails is counted, named once, and goes without.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from queue import SimpleQueue
from typing import Generic, TypeVar

from buffer.trajectory import Trajectory
from cluster.config.schema import RunConfig
from cluster.reports.score_table import Grid
from cluster.reports.score_table import rows as score_rows
from cluster.reports.trackers import TRACKERS, TrackedRun
from cluster.run.directory import RunDirectory
from cluster.run.display import first_line
from lm.hub import load_tokenizer
from tasks.evaluation.evaluation import Scores

CLOSE_S = 60.0  # for what is still to be sent when the run has ended
_SAMPLED = 8  # rationales of one prompt
_SAMPLE_COLUMNS = ("prompt", "rationale", "answer", "log R", "right", "version", "drawn")
_SCORE_COLUMNS = ("measured", "items", "before", "after")

Resource = TypeVar("Resource")


class Tracking:
    """What the driver tells of a run, and who is told: see `cluster.run.driver.Audience`.

    Args:
        newest: rationales that were drawn lately, of one prompt; asked in a thread of its own.
        report: takes one line for people; called in any thread.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        newest: Callable[[], Sequence[Trajectory]],
        report: Callable[[str], None],
    ) -> None:
        names = config.tracking.trackers
        run = TrackedRun(
            name=directory.name,
            project=config.tracking.project,
            folder=directory.path,
            config=config.model_dump(mode="json", exclude={"buffer"}),
        )
        self._trackers = [Worker(name, partial(TRACKERS[name], run), report) for name in names]
        sampler = partial(_Sampler, config, newest, self._table)
        self._samplers = [Worker("rationales", sampler, report)] if names else []

    def row(self, row: Mapping[str, float]) -> None:
        """Tell a row of `metrics.jsonl`."""
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        for worker in self._trackers:
            worker.put(lambda tracker: tracker.scalars(values, step))
        for sampler in self._samplers:
            sampler.put(lambda sampler: sampler.passed(step))

    def scores(self, scores: Scores) -> None:
        """Tell what has been measured so far."""
        last = 0
        for found in (one for one in (scores.before, scores.after) if one is not None):
            last = found.step or 0
            values = {
                f"evaluation/{name}": metric.value
                for name, metric in found.metrics.items()
                if metric.value is not None
            }
            for worker in self._trackers:
                worker.put(methodcaller("scalars", values, last))
        known = score_rows(scores.before, scores.after)
        rows = [(row.label, row.items, row.before, row.after) for row in known]
        self._table(Grid("before and after", _SCORE_COLUMNS, rows), last)

    def _table(self, grid: Grid, step: int) -> None:
        for worker in self._trackers:
            worker.put(lambda tracker: tracker.table(grid, step))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *_: object) -> None:
        for sampler in self._samplers:
            sampler.end(CLOSE_S)
        for worker in self._trackers:
            worker.put(lambda tracker: tracker.close())
        for worker in self._trackers:
            worker.end(CLOSE_S)


class Worker(Generic[Resource]):
    """Opens something and does one job after the other with it, in a thread of its own.

    Whatever fails is counted; the first failure is told, and the number of all at the end.
    """

    def __init__(
        self, name: str, open: Callable[[], Resource], report: Callable[[str], None]
    ) -> None:
        self.failures = 0
        self._name = name
        self._open = open
        self._report = report
        self._jobs: SimpleQueue[Callable[[Resource], None] | None] = SimpleQueue()
        # A daemon: one that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Resource], None]) -> None:
        """Have a job done later."""
        self._jobs.put(job)

    def end(self, timeout_s: float) -> None:
        """Wait until everything is done, but no longer."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            left = max(self._jobs.qsize() - 1, 0)
            self._report(f"tracking: {self._name} hung for {timeout_s:.0f} s; {left} not sent")
        elif self.failures > 1:
            self._report(f"tracking: {self._name} failed {self.failures} times")

    def _work(self) -> None:
        resource: Resource | None = None
        try:
            resource = self._open()
        except Exception as error:
            self._failed(error)
        while (job := self._jobs.get()) is not None:
            try:
                if resource is not None:
                    job(resource)
            except Exception as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            what = f"{type(error).__name__}: {first_line(error)}"
            self._report(f"tracking: {self._name}: {what}; the run goes on, metrics.jsonl has all")


@dataclass
class _Sampler:
    """Shows some rationales each so many steps."""

    config: RunConfig
    newest: Callable[[], Sequence[Trajectory]]
    show: Callable[[Grid, int], None]
    _due = 0  # step

    def __post_init__(self) -> None:
        self._decode = load_tokenizer(self.config.lm).decode
        self._every = self.config.tracking.samples_every_steps

    def passed(self, step: int) -> None:
        """Show a sample where one is due, and where rationales wait; else behind a later step."""
        if step >= self._due and (group := self.newest()):
            self._due = step + self._every
            rows = list(map(self._row, group[:_SAMPLED]))
            self.show(Grid("rationales", _SAMPLE_COLUMNS, rows), step)

    def _row(self, trajectory: Trajectory) -> tuple[str, ...]:
        texts = (trajectory.prompt, trajectory.completion, trajectory.answer)
        return (
            *(str(self._decode(tokens.tolist())) for tokens in texts),
            f"{trajectory.terminal_log_reward:.3f}",
            {True: "right", False: "wrong", None: ""}[trajectory.correct],
            str(trajectory.policy_version),
            f"{trajectory.behaviour}, temperature {trajectory.temperature:.3g}",
        )
