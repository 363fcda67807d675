"""What experiments of several runs share: a folder of their own, and runs that are made once."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any, NamedTuple

from rich.console import Console

from cluster.commands.train import train
from cluster.config.file import load_config, resolved_toml
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Result, result_of
from cluster.run.directory import RunDirectory, find_run, new_name, write_whole
from cluster.run.driver import read_scores
from cluster.run.evaluation import evaluate
from cluster.run.mirror import begun_elsewhere, fetch
from tasks.evaluation.evaluation import Evaluation

# What experiments are told stands among the other settings of their runs by then. Where a Redis
# listened, a run on a cluster chose itself.
_NO_FIGURE = frozenset(
    {"compare", "throughput", "tracking", "em.rounds", "em.overrides", "cluster.address"}
    | {"cluster.cpus", "cluster.dashboard", "cluster.max_restarts", "buffer.password_file"}
    | {f"buffer.{name}" for name in ("url", "transport", "bind", "port", "timeout_s")}
    | {f"cluster.{name}_timeout_s" for name in ("start", "silence", "answer", "stop")}
    | {f"cluster.{name}_placement" for name in ("actor", "reward", "learner")}
)


class Step(NamedTuple):
    """One run of an experiment."""

    title: str  # for people
    run: str
    config: RunConfig


class Suite:
    """The runs of one experiment: each is made once, however often the experiment is resumed.

    Args:
        arguments: of its verb.
        stem: of the experiment's name, where it has none yet.

    Raises UserError where the name is taken, or there is nothing to resume.
    """

    def __init__(self, arguments: argparse.Namespace, *, stem: str) -> None:
        name, resume = arguments.run, arguments.resume
        self.folder = RunDirectory(name or new_name(stem))
        if name and resume and not begun_elsewhere(self.folder):
            self.folder = find_run(name)
        if self.folder.path.exists() and not resume:
            raise UserError(
                f"{self.folder.path} exists: add --resume to go on with it, or choose --run"
            )
        self.console = Console(stderr=arguments.json)
        self._arguments = arguments

    def begun(self) -> AbstractContextManager[object]:
        """Makes the folder; within, only the result may go to stdout where JSON is asked for."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        return redirect_stdout(sys.stderr if self._arguments.json else sys.stdout)

    def take(self, steps: Sequence[Step], before: Evaluation | None = None) -> list[Result]:
        """Train what is not done yet, in order; one result for each.

        Args:
            before: the LM before the first step, where it was measured already.

        Raises:
            UserError: stopped on request, with steps left; or a step that is done has other
                settings.
            whatever `cluster.commands.train.train` raises.
        """
        results = []
        for step in steps:
            directory = RunDirectory(step.run)
            fetch(directory)  # of an experiment that another cluster began
            scores = read_scores(directory)
            if scores.after is not None:
                check_same_settings(directory, step.config)
            else:
                if len(steps) > 1:
                    self.console.print(f"── {step.title} (run {step.run})", soft_wrap=True)
                scores = train(
                    step.config,
                    directory,
                    resume=directory.path.exists(),
                    address=self._arguments.address,
                    local=self._arguments.local,
                    before=before,
                    console=self.console,
                )
            if scores.after is None:
                raise UserError(
                    f"stopped in {step.title}; the same command with --run {self.folder.name} "
                    "--resume goes on"
                )
            # What an M-step leaves is another LM, and was measured after the policy.
            before = None if step.config.learner.traits.trains_model else scores.before
            results.append(result_of(step.run, scores.after, step.config, method=step.title))
        return results

    def measure(self, step: Step, before: Evaluation | None = None) -> Result:
        """Measure the LM without an adapter, in this process, unless that is done.

        Args:
            before: what that would find, where it was measured already.
        """
        directory = RunDirectory(step.run)
        scores = read_scores(directory)
        measured = scores.before
        if measured is not None:
            check_same_settings(directory, step.config)
        else:
            directory.begin(resume=directory.config_file.exists())
            try:
                write_whole(directory.config_file, resolved_toml(step.config))
                measured = before or evaluate(step.config, adapter=None, step=0)
                scores = scores.model_copy(update={"before": measured})
                write_whole(directory.scores_file, scores.model_dump_json(indent=2))
            finally:
                directory.end()
        return result_of(step.run, measured, step.config, method=step.title)


def check_same_settings(directory: RunDirectory, config: RunConfig) -> None:
    """Raise UserError unless a run that has begun was made as `config` says, in all it reads."""
    made, asked = (
        _settings(each.model_dump(mode="json"))
        for each in (load_config(str(directory.config_file)), config)
    )
    if other := [key for key in {**made, **asked} if made.get(key) != asked.get(key)]:
        raise UserError(
            f"{directory.path} was made with other settings than are asked for now "
            f"({', '.join(other)}): choose another --run, or restore the settings that its "
            "config.toml has"
        )


def _settings(table: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Values by dotted key, without those that decide no figure of a run that is done."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if (key := f"{section}.{name}".lstrip(".")) in _NO_FIGURE:
            continue
        found |= _settings(value, key) if isinstance(value, Mapping) else {key: value}
    return found
