"""What a comparison of methods found: results of runs, means over seeds, and what was chosen."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field

from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory
from cluster.run.display import ELAPSED_S
from cluster.run.metrics_log import read_metrics
from lm.config import Frozen
from tasks.evaluation.evaluation import Evaluation

_TOKENS = ("sampled", "scored", "learned", "base")


class Result(Frozen):
    """One method with one seed."""

    method: str
    seed: int
    run: str = Field(description="Its name in runs/.")
    metrics: dict[str, float] = Field(description="What was measured afterwards.")
    compute: dict[str, float] = Field(description="Steps, trajectories, tokens, seconds.")
    note: str = Field("", description="Of the measurement: what its reader must know.")


class Summary(Frozen):
    """One figure over the seeds."""

    mean: float
    std: float | None = Field(description="Of the sample, n - 1; None for a single seed.")

    def __str__(self) -> str:
        """Mean and deviation as read: shares and nats to four digits, counts whole."""
        text = f"{self.mean:{'.0f' if abs(self.mean) >= 1000 else '.4g'}}"
        if self.std is None:
            return text
        return f"{text} ± {self.std:{'.0f' if self.std >= 1000 else '.2g'}}"


class Trial(Frozen):
    """One run of a method with the search's seed."""

    run: str = Field(description="Its name in runs/.")
    values: dict[str, float] = Field(description="What was tried, by key of the configuration.")
    figure: float | None = Field(description="Its headline on the validation split, if finite.")

    def __str__(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]} {v:g}" for key, v in self.values.items())


class Choice(Frozen):
    """What a method's test figures are measured with, and out of what that was chosen."""

    method: str
    metric: str = Field(description="The headline of the task; of several groups, their mean.")
    better: Literal["higher", "lower"]
    seed: int = Field(description="Of all trials.")
    trials: tuple[Trial, ...]
    chosen: Trial


Table = dict[str, dict[str, Summary]]  # method -> figure -> summary


def result_of(run: str, measured: Evaluation, config: RunConfig, *, method: str) -> Result:
    """The result of a finished run, from what it left."""
    return Result(
        method=method,
        seed=config.seed,
        run=run,
        metrics=figures(measured),
        compute=compute_of(RunDirectory(run), scored_by_lm=config.task.reward_kind != "function"),
        note=measured.note,
    )


def figures(measured: Evaluation) -> dict[str, float]:
    """Every metric that says how good a policy is, by name."""
    return {
        name: metric.value
        for name, metric in measured.metrics.items()
        if metric.value is not None and metric.better is not None
    }


def compute_of(directory: RunDirectory, *, scored_by_lm: bool) -> dict[str, float]:
    """What a run learned from and what that cost; each step once, however often it was resumed."""
    recorded = [row for row in read_metrics(directory.metrics_file) if "step" in row]
    rows = {row["step"]: row for row in recorded}

    def total(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows.values())

    tokens = {f"tokens_{name}": total(f"tokens/{name}") for name in _TOKENS}
    if not scored_by_lm:
        tokens["tokens_scored"] = 0.0
    # A run that was resumed began to count its seconds anew with each sitting.
    elapsed_s = [row.get(ELAPSED_S, 0.0) for row in recorded]
    sittings_s = [now for now, then in pairwise([*elapsed_s, float("-inf")]) if then < now]
    return {
        "steps": float(len(rows)),
        "trajectories": total("batch/trajectories"),
        **tokens,
        "tokens": sum(tokens.values()),
        "training_s": sum(sittings_s, start=0.0),
    }


def summarise(results: Sequence[Result], what: str) -> Table:
    """Means over seeds of `metrics` or of `compute`; methods in the order of their first result."""
    table: Table = {}
    for method in dict.fromkeys(result.method for result in results):
        rows = [getattr(result, what) for result in results if result.method == method]
        names = dict.fromkeys(name for row in rows for name in row)
        table[method] = {
            name: _summary([row[name] for row in rows if name in row]) for name in names
        }
    return table


def _summary(values: Sequence[float]) -> Summary:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(mean=float(np.mean(values)), std=std)
