"""Measuring a policy: by answers where the task has test questions, else by its posterior."""

from pathlib import Path

from cluster.config import RunConfig
from cluster.measurement import Measurement
from cluster.posterior_assessment import assess
from cluster.votes import measure_votes


def measure(config: RunConfig, *, adapter: Path | None) -> Measurement:
    """Measure the base LM (None) or an adapter on it.

    Raises:
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        DataError: a test file is missing or malformed.
    """
    if config.task.tests:
        return measure_votes(config, adapter=adapter)
    return assess(config, adapter=adapter).policy
