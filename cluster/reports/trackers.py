"""The programs that show a run's figures, each behind the same three calls.

A library is imported where its tracker is opened, and nowhere else: none of them is needed.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.config.project import UserError
from cluster.config.tracking import TrackerName
from cluster.reports.score_table import Grid

# Characters that mean something in Markdown or HTML, as references; a line's end as a sign.
_MARKUP = {ord(sign): f"&#{ord(sign)};" for sign in "&<>|[]()*_`~#!\\$:"} | {ord("\n"): "↵"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run before anything else."""

    name: str
    project: str
    folder: Path  # of the run
    config: Mapping[str, Any]

    def remembered(self, tracker: TrackerName) -> str | None:
        """Under which id the tracker has known the run since an earlier sitting."""
        file = self._id_file(tracker)
        return file.read_text(encoding="utf-8").strip() if file.exists() else None

    def remember(self, tracker: TrackerName, id: str) -> None:
        """Keep the id for sittings to come."""
        file = self._id_file(tracker)
        file.parent.mkdir(exist_ok=True)
        file.write_text(id, encoding="utf-8")

    def _id_file(self, tracker: TrackerName) -> Path:
        return self.folder / "tracking" / f"{tracker}.id"


class Tracker(Protocol):
    """One of them, opened for a run."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Figures of one optimizer step, by name."""

    def table(self, grid: Grid, step: int) -> None:
        """Texts in rows; a table of the same title takes the place of an older one."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in the run's folder, `tensorboard/`, by torch's writer and its library."""

    def __init__(self, run: TrackedRun) -> None:
        library = importlib.import_module("torch.utils.tensorboard")
        self._writer = library.SummaryWriter(str(run.folder / "tensorboard"), flush_secs=10)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, grid: Grid, step: int) -> None:
        cells = [[cell.translate(_MARKUP) for cell in row] for row in grid.rows]
        self._writer.add_text(grid.title, grid._replace(rows=cells).markdown(), step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        self._library = library = importlib.import_module("wandb")
        online = library.setup().settings.mode in ("online", "shared")
        if online and not library.login(prompt=False):  # init would ask at the terminal
            raise UserError("nobody is logged in: 'wandb login', or set WANDB_MODE=offline")
        self._run = library.init(
            project=run.project,
            name=run.name,
            id=run.remembered("wandb"),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
        )
        run.remember("wandb", self._run.id)
        # Steps that a replaced learner does again are steps again; by its own count they would be
        # dropped.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def table(self, grid: Grid, step: int) -> None:
        self._run.log({grid.title: self._library.Table(**_lists(grid)), "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment `project` at MLFLOW_TRACKING_URI, or where MLflow keeps its own."""

    def __init__(self, run: TrackedRun) -> None:
        self._library = library = importlib.import_module("mlflow")
        self._client = library.MlflowClient()
        id = run.remembered("mlflow")
        if id is None:
            experiment = self._client.get_experiment_by_name(run.project)
            number = (
                self._client.create_experiment(run.project)
                if experiment is None
                else experiment.experiment_id
            )
            id = self._client.create_run(number, run_name=run.name).info.run_id
            run.remember("mlflow", id)
        self._id = id
        self._client.log_dict(id, dict(run.config), "config.json")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        metric = self._library.entities.Metric
        metrics = [metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def table(self, grid: Grid, step: int) -> None:
        by_column = {name: [row[at] for row in grid.rows] for at, name in enumerate(grid.header)}
        self._client.log_dict(self._id, by_column, f"{grid.title}/{step:08d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """Trackio, on this machine unless TRACKIO_SPACE_ID names a Space."""

    def __init__(self, run: TrackedRun) -> None:
        self._library = library = importlib.import_module("trackio")
        library.init(project=run.project, name=run.name, resume="allow", config=dict(run.config))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._library.log(dict(values), step=step)

    def table(self, grid: Grid, step: int) -> None:
        self._library.log({grid.title: self._library.Table(**_lists(grid))}, step=step)

    def close(self) -> None:
        self._library.finish()


def _lists(grid: Grid) -> dict[str, list[Any]]:
    """A table as those of wandb and trackio take it."""
    return {"columns": list(grid.header), "data": [list(row) for row in grid.rows]}


TRACKERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise UserError where a tracker that is asked for is not installed; imports none."""
    for name in names:  # as its library is called
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking = [\"{name}\"], but {name} is not installed: 'pip install {name}', or "
                "leave it out"
            )
