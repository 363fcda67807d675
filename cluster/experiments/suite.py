"""What experiments of several runs share: a folder of their own, runs that are done, and a page."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from rich.console import Console

from cluster.config.file import resolved_toml
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Result, Table, summarise
from cluster.experiments.comparison_report import draw, shown_table, write_page
from cluster.run.directory import RunDirectory, find_run, new_name, write_whole
from cluster.run.driver import read_scores
from tasks.evaluation.evaluation import Scores


def experiment_folder(name: str | None, *, stem: str, resume: bool) -> RunDirectory:
    """The folder of a new experiment, which is not made yet, or of the one that goes on.

    Args:
        stem: of its name, where it has none yet.

    Raises UserError where the name is taken, or there is nothing to resume.
    """
    folder = find_run(name) if name and resume else RunDirectory(name or new_name(stem))
    if folder.path.exists() and not resume:
        raise UserError(f"{folder.path} exists: add --resume to go on with it, or choose --run")
    return folder


def finished(directory: RunDirectory, config: RunConfig) -> Scores | None:
    """What a run has measured that is done; None where it is to be run, or to go on.

    Raises:
        UserError: it was made with other settings than `config`.
    """
    scores = read_scores(directory)
    if scores.after is None:
        return None
    check_same_settings(directory, config)
    return scores


def check_same_settings(directory: RunDirectory, config: RunConfig) -> None:
    """Raise UserError unless a run that has begun was made as `config` says, in all it reads."""
    if _settings(directory.config_file.read_text()) != _settings(resolved_toml(config)):
        raise UserError(
            f"{directory.path} was made with other settings than are asked for now: choose "
            "another --run, or restore the settings that its config.toml has"
        )


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


class Findings:
    """The results of an experiment as people and programs read them.

    Args:
        name: of its files, `NAME.png` and `NAME.json`.
    """

    def __init__(self, folder: RunDirectory, name: str, task: str, results: Sequence[Result]):
        self.metrics: Table = summarise(results, "metrics")
        self._compute = summarise(results, "compute")
        self._folder = folder
        self._name = name
        self._task = task
        self._results = results

    def leave(self, plots: Sequence[Path] = ()) -> None:
        """Write the JSON, the figure, and the page with it and with those in `plots`."""
        figure = draw(self.metrics, self._folder.path / f"{self._name}.png")
        write_page(
            self._folder.report_file,
            title=f"{self._task}: {', '.join(self.metrics)}",
            metrics=self.metrics,
            compute=self._compute,
            plots=[*plots, figure],
            runs="\n".join(result.run for result in self._results),
        )
        write_whole(self._folder.path / f"{self._name}.json", self._as_json())

    def show(self, title: str, *, as_json: bool, console: Console) -> None:
        """Print the tables, or one JSON object."""
        if as_json:
            print(self._as_json())
            return
        console.print(shown_table(self.metrics, title))
        console.print(shown_table(self._compute, "what it took"))
        console.print(f"page: {self._folder.report_file}", soft_wrap=True, markup=False)

    def _as_json(self) -> str:
        content = {
            "task": self._task,
            "table": self.metrics,
            "compute": self._compute,
            "runs": list(self._results),
        }
        return to_json(content, inf_nan_mode="null").decode()
