"""Runs that are part of something larger: whether one is done, and was made as is asked for now."""

import tomllib
from typing import Any

from cluster.config.file import resolved_toml
from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory
from cluster.run.driver import read_scores
from tasks.evaluation.evaluation import Scores


def made_with(directory: RunDirectory, config: RunConfig) -> bool:
    """Whether a run that has begun has this configuration, in all that it reads itself."""
    return _settings(directory.config_file.read_text()) == _settings(resolved_toml(config))


def finished(directory: RunDirectory) -> Scores | None:
    """What a run has measured that is done; None where it is to be run, or to go on."""
    scores = read_scores(directory)
    return None if scores.after is None else scores


def _settings(toml: str) -> dict[str, Any]:
    """All but the address at which a run's Redis listened: on a cluster the run chooses it.

    What is said of comparisons and experiments is not read by their runs: what concerns one of
    them stands among its other settings by then.
    """
    settings = tomllib.loads(toml)
    settings["buffer"].pop("bind", None)
    for section in ("compare", "throughput"):
        settings.pop(section, None)
    return settings
