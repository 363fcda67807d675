"""The driver of a run: a request to stop is heeded in every phase."""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from buffer.stats import Counters, ReplayStats
from cluster.commands.train import stop_on_signal
from cluster.config.file import load_config
from cluster.run.directory import RunDirectory, RunState, first_state, read_scores
from cluster.run.driver import Driver
from tasks.evaluation.evaluation import Evaluation, Metric, Scores

TV = Metric(label="total variation", value=0.5, better="lower", items=1)
BASE = Evaluation(task="toy", temperature=1.0, step=0, metrics={"tv": TV})
NOTHING = ReplayStats(
    **dict.fromkeys(
        (
            *("replay_size", "replay_prompts", "times_sampled_max", "fresh_groups"),
            *("undrawn_groups", "version", "age_max_versions"),
        ),
        0,
    ),
    times_sampled_mean=0.0,
    age_mean_versions=0.0,
    counters=Counters(),
)

BUFFER: Any = SimpleNamespace(revived=lambda: "", stats=lambda: NOTHING)
NOBODY: Any = SimpleNamespace(row=lambda row: None, scores=lambda scores: None)


class Endless:
    """An evaluation that is never done."""

    def done(self) -> bool:
        return False

    def result(self) -> Any:
        raise AssertionError("its result was waited for")


class TrainedRun:
    """A run whose learner has done its steps."""

    learner_rows: list[dict[str, float]] = []  # noqa: RUF012
    running = finished = settled = True
    given_up = ""
    learner_status = {"step": 3, "version": 3}  # noqa: RUF012

    def counts(self) -> dict[str, dict[str, int]]:
        return {"desired": {}, "actual": {}}

    def actor_totals(self) -> dict[str, float]:
        return {}

    def record_metrics(self, *_: object) -> None:
        """To nobody."""

    def stop(self, timeout_s: float) -> list[str]:
        return []


class EndlessSession:
    """Trains at once and evaluates for ever."""

    address = ""
    in_process = closed = False

    def open(self) -> None:
        """Nothing is needed."""

    def start(self, report: object, stop: object) -> Any:
        return TrainedRun()

    def evaluate(self, adapter: Path | None, report: object, progress: Any, *, step: int) -> Any:
        return Endless()

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("before", [None, BASE])
def test_a_run_that_is_stopped_while_it_is_measured_ends_as_stopped(
    before: Evaluation | None, tmp_path: Path
) -> None:
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    if before is not None:
        directory.scores_file.write_text(Scores(before=before).model_dump_json())
    phases: list[str] = []

    def show(state: RunState) -> None:
        phases.append(state.phase)
        if state.phase == "evaluating":
            directory.stop_request.touch()

    terminal: Any = SimpleNamespace(event=print, show=show)
    session = EndlessSession()
    driver = Driver(
        load_config("tasks/toy.toml"),
        directory,
        session,
        terminal,
        BUFFER,
        NOBODY,
    )
    assert driver.drive() == Scores(before=before)
    state = directory.state()
    assert state is not None and (state.phase, state.step) == ("stopped", 3)
    assert phases[-2:] == ["evaluating", "stopped"] and session.closed


class MeasuringSession(EndlessSession):
    """Measures in this process, for as long as `work` takes."""

    in_process = True

    def __init__(self, work: Callable[[Callable[[str], None]], None]) -> None:
        self.work, self.started = work, False

    def start(self, report: object, stop: object) -> Any:
        self.started = True
        return TrainedRun()

    def evaluate(self, adapter: Path | None, report: object, progress: Any, *, step: int) -> Any:
        self.work(progress)
        raise AssertionError("it measured to its end")


@pytest.mark.parametrize("asked_by", ["signal", "file"])
@pytest.mark.parametrize("before", [None, BASE])
def test_what_a_process_measures_by_itself_is_ended_at_once_and_shown_until_then(
    asked_by: str, before: Evaluation | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run.driver._TELL_EVERY_S", 0.0)
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    if before is not None:
        directory.scores_file.write_text(Scores(before=before).model_dump_json())
    told: list[str] = []
    states: list[RunState] = []
    terminal: Any = SimpleNamespace(event=told.append, show=states.append)

    def work(progress: Callable[[str], None]) -> None:
        progress("3 of 9 texts")
        if asked_by == "signal":
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the signal was not heeded")
        directory.stop_request.touch()
        progress("4 of 9 texts")

    session = MeasuringSession(work)
    driver = Driver(load_config("tasks/toy.toml"), directory, session, terminal, BUFFER, NOBODY)
    with stop_on_signal(driver.request_stop):
        assert driver.drive() == Scores(before=before)
    what = "the base language model" if before is None else "the policy"
    state = directory.state()
    assert state is not None and state.phase == "stopped"
    assert state.message == f"stopped on request while measuring {what}: --resume begins that anew"
    assert "... 3 of 9 texts" in told and "... 4 of 9 texts" not in told
    assert session.closed and session.started == (before is not None)


@pytest.mark.parametrize("how", ["stop", "failure"])
def test_what_a_stop_or_a_failure_while_loading_leaves(how: str, tmp_path: Path) -> None:
    """The base's measurement, where that is done, and the step at which the run stood."""
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    last = first_state("r", steps=900).model_copy(update={"step": 500, "version": 400})
    directory.write_state(last)

    class Session(EndlessSession):
        in_process = True

        def start(self, report: object, stop: object) -> Any:
            if how == "failure":
                raise OSError("no weights")
            driver.request_stop()

        def evaluate(self, *_: object, step: int) -> Any:
            return SimpleNamespace(done=lambda: True, result=lambda: BASE)

    terminal: Any = SimpleNamespace(event=print, show=lambda state: None)
    config = load_config("tasks/toy.toml", ["learner.steps=900"])
    driver = Driver(config, directory, Session(), terminal, BUFFER, NOBODY)
    with nullcontext() if how == "stop" else pytest.raises(OSError, match="no weights"):
        driver.drive()
    state = directory.state()
    assert state is not None and state.phase == ("stopped" if how == "stop" else "failed")
    assert (state.step, state.version, state.steps) == (500, 400, 900)
    assert read_scores(directory) == Scores(before=BASE)


def test_what_a_measurement_elsewhere_tells_does_not_delay_the_next_figures(
    tmp_path: Path,
) -> None:
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    terminal: Any = SimpleNamespace(event=print, show=lambda state: None)
    config = load_config("tasks/toy.toml")
    driver = Driver(config, directory, EndlessSession(), terminal, BUFFER, NOBODY)
    driver._hear("4 of 9 texts")
    assert directory.state() is None  # or the run's figures would wait for another second
    driver._alone = "measuring"
    driver._hear("5 of 9 texts")
    assert directory.state() is not None


def test_scores_of_another_version_are_told_and_count_for_nothing(tmp_path: Path) -> None:
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    old = (
        '{"before": {"kind": "distance", "prompts": 1, "enumerated": 1, "tv": 0.5}, "after": null}'
    )
    directory.scores_file.write_text(old)
    told: list[str] = []
    assert read_scores(directory, told.append) == Scores()
    assert len(told) == 1 and str(directory.scores_file) in told[0] and "measured again" in told[0]
    directory.scores_file.write_text(Scores(before=BASE).model_dump_json())
    assert read_scores(directory, told.append) == Scores(before=BASE) and len(told) == 1


def test_a_run_that_its_time_limit_ended_says_so(tmp_path: Path) -> None:
    class Unfinished(TrainedRun):
        finished = False

        def tick(self) -> None:
            """Nothing."""

        def counts(self) -> dict[str, dict[str, int]]:
            return {"desired": {"actors": 1}, "actual": {"actors": 1}}

    class Measured:
        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return BASE

    class Session(EndlessSession):
        def start(self, report: object, stop: object) -> Any:
            return Unfinished()

        def evaluate(self, adapter: Path | None, *_: object, step: int) -> Any:
            return Measured()

    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    terminal: Any = SimpleNamespace(event=print, show=lambda state: None)
    config = load_config("tasks/toy.toml", ["cluster.time_limit_s=0.01", "learner.steps=40"])
    Driver(
        config,
        directory,
        Session(),
        terminal,
        BUFFER,
        NOBODY,
    ).drive()
    state = directory.state()
    assert state is not None and (state.phase, state.ended) == ("out of time", True)
    assert state.message == "cluster.time_limit_s = 0.01 was over at step 3 of 40: --resume goes on"


def test_a_measurement_of_an_earlier_step_is_not_shown_beside_a_later_policy(
    tmp_path: Path,
) -> None:
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    terminal: Any = SimpleNamespace(event=print, show=lambda state: None)
    for step, kept in ((2, False), (3, True)):  # the run is at step 3
        after = BASE.model_copy(update={"step": step})
        directory.scores_file.write_text(Scores(before=BASE, after=after).model_dump_json())
        driver = Driver(
            load_config("tasks/toy.toml"),
            directory,
            EndlessSession(),
            terminal,
            BUFFER,
            NOBODY,
        )
        driver.request_stop()
        assert driver.drive() == Scores(before=BASE, after=after if kept else None)


def test_a_full_disk_is_told_once_for_each_file_until_it_takes_all_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir()
    full = True
    said: list[str] = []

    def write(row: object) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    def write_text(*_: object, **how: object) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr("cluster.run.directory.os.replace", lambda *_: None)
    terminal: Any = SimpleNamespace(event=said.append, show=lambda state: None)
    log: Any = SimpleNamespace(write=write)
    config = load_config("tasks/toy.toml")
    driver = Driver(config, directory, EndlessSession(), terminal, BUFFER, NOBODY)

    def work(times: int, *, rows: int = 1) -> list[str]:
        said.clear()
        driver._unwritten = [{"step": 1.0}] * rows
        for _ in range(times):
            driver._state_written_s = float("-inf")
            driver._write_rows(log)
            driver._show()
        return sorted(line.split(":")[0] for line in said)

    told = ["could not write metrics.jsonl", f"could not write {directory.state_file}"]
    assert work(5) == sorted(told)
    full = False
    assert work(2) == []
    full = True
    assert work(5) == sorted(told)
    full = False
    assert work(2) == []
    full = True
    assert work(5, rows=0) == told[1:]
