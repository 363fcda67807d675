"""What experiments of several runs share: a folder of their own, and runs that are made once."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any, NamedTuple

from rich.console import Console

from cluster.commands.train import stop_on_signal, train
from cluster.config.file import load_config, resolved_toml
from cluster.config.project import UserError, told
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Result, result_of
from cluster.run.directory import RunDirectory, find_run, new_name, read_scores, write_whole
from cluster.run.driver import Stopped
from cluster.run.evaluation import evaluate
from cluster.run.mirror import begun_elsewhere, fetch
from cluster.run.terminal import stages
from learner.demonstrations import NoDemonstrations
from tasks.evaluation.evaluation import Evaluation, Scores

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
    trained: bool = True  # False: the LM is measured as it is, in this process

    def found(self, scores: Scores) -> Evaluation | None:
        """What its run is made for, where that is done."""
        return scores.after if self.trained else scores.before


class Member(NamedTuple):
    """One method of a comparison with one seed."""

    method: str
    title: str  # for people
    steps: Sequence[Step]  # its runs: of gflownet_em several, the first of which is gflownet's

    @property
    def run(self) -> str:
        """The name of its own run, which is the last."""
        return self.steps[-1].run


class Suite:
    """The runs of one experiment: each is made once, however often the experiment is resumed.

    The base LM is measured once for all runs that would find the same.

    Args:
        arguments: of its verb.
        stem: of the experiment's name, where it has none yet.
        endings: regular expression of what its runs have in their names behind its own.

    Raises UserError where the name is taken, or there is nothing to resume.
    """

    def __init__(self, arguments: argparse.Namespace, *, stem: str, endings: str) -> None:
        name, resume = arguments.run, arguments.resume
        self.folder = RunDirectory(name or new_name(stem))
        if not resume:
            self.folder.check(resume=False)
        elif name and not begun_elsewhere(self.folder, endings):
            self.folder = find_run(name)
        self.console = Console(stderr=arguments.json)
        self._arguments = arguments
        self._before: dict[str, Evaluation | None] = {}  # by what a measurement depends on

    def begun(self) -> AbstractContextManager[object]:
        """Makes the folder; within, only the result may go to stdout where JSON is asked for."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        return redirect_stdout(sys.stderr if self._arguments.json else sys.stdout)

    def result(self, member: Member, place: str) -> Result:
        """Of a member, measured after the last of its runs, at the cost of all.

        Args:
            place: among others, for people: '2 of 9'.
        """
        self.console.print(f"── {place}: {member.title}", soft_wrap=True)
        with _named(member.title):
            results = self.take(member.steps)
        compute = {key: sum(r.compute[key] for r in results) for key in results[-1].compute}
        return results[-1].model_copy(update={"method": member.method, "compute": compute})

    def take(self, steps: Sequence[Step]) -> list[Result]:
        """Make what is not done yet, in order; one result for each.

        Raises:
            UserError: stopped on request, with steps left; or a step that is done has other
                settings.
            whatever `cluster.commands.train.train` raises.
        """
        results = []
        alike = _measured_alike(steps[0].config)
        before = self._before.get(alike)
        for step in steps:
            directory = RunDirectory(step.run)
            fetch(directory)  # of an experiment that another cluster began
            scores = read_scores(directory)
            if step.found(scores) is not None:
                check_same_settings(directory, step.config)
            elif not step.trained:
                scores = self._measure(step.config, directory, before)
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
            if (found := step.found(scores)) is None:
                raise UserError(
                    f"stopped in {step.title}; the same command with --run {self.folder.name} "
                    "--resume goes on"
                )
            if step is steps[0]:
                self._before[alike] = scores.before or before
            # What an M-step leaves is another LM, and was measured after the policy.
            before = None if step.config.learner.traits.trains_model else scores.before
            results.append(result_of(step.run, found, step.config, method=step.title))
        return results

    def _measure(
        self, config: RunConfig, directory: RunDirectory, before: Evaluation | None
    ) -> Scores:
        """Measure the LM without an adapter, unless it is known what that would find; nothing where
        that is stopped on request."""
        directory.begin(resume=directory.config_file.exists())
        try:
            write_whole(directory.config_file, resolved_toml(config))
            if before is None:
                with stages(self.console) as progress, stop_on_signal(_end_measuring):
                    before = evaluate(config, adapter=None, step=0, progress=progress)
            scores = Scores(before=before)
            write_whole(directory.scores_file, scores.model_dump_json(indent=2))
        except Stopped:
            return Scores()
        finally:
            directory.end()
        return scores


def _end_measuring() -> None:
    raise Stopped("measuring the base language model")


def _measured_alike(config: RunConfig) -> str:
    """Equal for runs whose base LM is measured as the same: all that this depends on.

    The run's own seed chooses worked examples, and draws where there are no test files.
    """
    sections = config.model_dump(
        include={"lm", "task", "reward", "evaluation", "posterior"}, mode="json"
    )
    seeded = not config.task.tests or config.evaluation.shots
    seed = config.seed if seeded else None
    return json.dumps([sections, config.learner.trained_temperature(), seed])


@contextmanager
def _named(title: str) -> Iterator[None]:
    """Errors that are written for people say which run they are of; others, defects, get a note."""
    try:
        yield
    except NoDemonstrations as error:
        raise UserError(f"{title}: {error}; leave it out of --methods") from error
    except Exception as error:
        if (text := told(error)) is not None:
            raise UserError(f"{title}: {text}") from error
        error.add_note(f"in {title}")
        raise


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
