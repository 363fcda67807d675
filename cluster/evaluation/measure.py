"""Measuring a policy: by test files where the task has some, else by its posterior."""

from pathlib import Path

from cluster.config.schema import RunConfig
from cluster.evaluation.labels import measure_labels
from cluster.evaluation.measurement import Measurement
from cluster.evaluation.posterior_assessment import assess
from cluster.evaluation.sentences import measure_continuations, measure_infills
from cluster.evaluation.votes import measure_votes
from cluster.run.directory import merged_folder
from tasks.config import ContinuationConfig, InfillingConfig, SubjectivityConfig


def measure(config: RunConfig, *, adapter: Path | None) -> Measurement:
    """Measure the base LM (None) or an adapter on it; of an M-step the LM that it left.

    Where labels are given, an M-step's policy goes on to give the reasons, and the LM that the step
    left answers behind them.

    Raises:
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        DataError: a test file is missing or malformed.
    """
    answering = config
    if adapter is not None and config.learner.objective == "joint":
        answering = config.with_model(merged_folder(adapter))
        if isinstance(config.task, SubjectivityConfig):
            adapter = Path(str(config.em.policy))
        else:
            config, adapter = answering, None
    if not config.task.tests:
        return assess(config, adapter=adapter).policy
    match config.task:
        case InfillingConfig() as task:
            return measure_infills(config, task, adapter=adapter)
        case ContinuationConfig() as task:
            return measure_continuations(config, task, adapter=adapter)
        case SubjectivityConfig() as task:
            return measure_labels(config, task, adapter=adapter, answering=answering.lm)
    return measure_votes(config, adapter=adapter)
