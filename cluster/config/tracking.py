"""Where a run's figures are shown besides its own folder: nowhere, unless that is asked for.

Where a tracker keeps or sends what it is told is its own setting, made by its own means, such as
WANDB_MODE or MLFLOW_TRACKING_URI.
"""

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from lm.config import Frozen

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackingConfig(Frozen):
    """The `[tracking]` section; a list in its place, as in tracking = ["wandb"], is `trackers`."""

    trackers: tuple[TrackerName, ...] = ()
    """Who is told the figures of metrics.jsonl, the table before/after and some rationales:
    tensorboard, wandb, mlflow, trackio, each of which is installed apart. None: nobody. tracking =
    ["wandb"] says this key alone."""
    project: str = Field("amortize", min_length=1)
    """Project, or experiment, that wandb, mlflow and trackio list the run under."""
    samples_every_steps: PositiveInt = 50
    """Optimizer steps between two samples of rationales."""

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return {"trackers": value} if isinstance(value, list | tuple) else value
