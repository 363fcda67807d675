"""The members of a comparison: one method with one seed each, and the runs that it takes."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cluster.config.project import UserError, told
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Result
from cluster.experiments.methods import EM, em_method_steps, method, method_config
from cluster.experiments.suite import Step, Suite
from cluster.run.directory import RunDirectory
from cluster.run.driver import read_scores
from learner.demonstrations import NoDemonstrations
from tasks.evaluation.evaluation import Evaluation


class Member(NamedTuple):
    """One method with one seed."""

    method: str
    title: str  # for people
    steps: Sequence[Step]  # its runs: of gflownet_em several, the first of which is gflownet's

    @property
    def run(self) -> str:
        """The name of its own run, which is the last."""
        return self.steps[-1].run


def member(
    shared: RunConfig, title: str, *, seed: int, run: str, gflownet: str, steps: int | None = None
) -> Member:
    """A method with a seed; raises ConfigError, UnknownMethod.

    Args:
        title: of the method.
        run: the name of its own run.
        gflownet: ... and of that of gflownet with the same seed.
        steps: optimizer steps, of a method at equal LM tokens.
    """
    shown = f"{title}, seed {seed} (run {run})"
    if title == EM:
        return Member(title, shown, em_method_steps(shared, seed=seed, first=gflownet, own=run))
    config = method_config(shared, title=title, seed=seed, steps=steps)
    return Member(title, shown, (Step(shown, run, config),))


class Members:
    """Makes the runs of members; the base LM is measured once for all that would find the same."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._before: dict[str, Evaluation | None] = {}  # by what a measurement depends on

    def result(self, member: Member, place: str) -> Result:
        """From its runs, or from the files of those that are done; measured after the last of
        them, at the cost of all.

        Args:
            place: among others, for people: '2 of 9'.
        """
        first = member.steps[0]
        self._suite.console.print(f"── {place}: {member.title}", soft_wrap=True)
        with _named(member.title):
            same = _measured_alike(first.config)
            before = self._before.get(same)
            if method(member.method).trained:
                results = self._suite.take(member.steps, before)
            else:
                results = [self._suite.measure(first, before)]
            self._before[same] = read_scores(RunDirectory(first.run)).before or before
        compute = {key: sum(r.compute[key] for r in results) for key in results[-1].compute}
        return results[-1].model_copy(update={"method": member.method, "compute": compute})


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
