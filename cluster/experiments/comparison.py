"""What a comparison of methods found: one result for each run, and their means over seeds."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory
from cluster.run.display import ELAPSED_S
from cluster.run.metrics_log import read_metrics
from tasks.evaluation.evaluation import Evaluation

TOKENS = ("sampled", "scored", "learned", "base")


class Result(BaseModel):
    """One method with one seed."""

    model_config = ConfigDict(frozen=True)

    method: str
    seed: int
    run: str = Field(description="Its name in runs/.")
    metrics: dict[str, float] = Field(description="What was measured afterwards.")
    compute: dict[str, float] = Field(description="Steps, trajectories, tokens, seconds.")


class Summary(BaseModel):
    """One figure over the seeds."""

    model_config = ConfigDict(frozen=True)

    mean: float
    std: float | None = Field(description="Of the sample, n - 1; None for a single seed.")


Table = dict[str, dict[str, Summary]]  # method -> figure -> summary


def result_of(
    directory: RunDirectory, measured: Evaluation, config: RunConfig, *, method: str, seed: int
) -> Result:
    """The result of a finished run, from what it left."""
    return Result(
        method=method,
        seed=seed,
        run=directory.name,
        metrics=figures(measured),
        compute=compute_of(directory, scored_by_lm=config.task.reward_kind != "function"),
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

    tokens = {f"tokens_{name}": total(f"tokens/{name}") for name in TOKENS}
    if not scored_by_lm:
        tokens["tokens_scored"] = 0.0
    return {
        "steps": float(len(rows)),
        "trajectories": total("batch/trajectories"),
        **tokens,
        "tokens": sum(tokens.values()),
        "training_s": _training_s([row.get(ELAPSED_S, 0.0) for row in recorded]),
    }


def _training_s(elapsed_s: Sequence[float]) -> float:
    """Seconds in all: a run that was resumed began to count anew with each sitting."""
    ends = [now for now, following in pairwise([*elapsed_s, float("-inf")]) if following < now]
    return sum(ends, start=0.0)


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
    several = len(values) > 1
    return Summary(
        mean=float(np.mean(values)), std=float(np.std(values, ddof=1)) if several else None
    )
