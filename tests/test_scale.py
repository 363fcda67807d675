"""The request to scale a run, and how the verb waits for it."""

import fcntl
import threading
import time
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.commands.scale import scale
from cluster.config.project import UserError
from cluster.distributed.reward_worker import CallCounter
from cluster.run.directory import (
    RunDirectory,
    RunState,
    ScaleAnswer,
    ScaleOutcome,
    ScaleRequest,
    first_state,
    post_scale_request,
    take_scale_request,
)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Of a run that trains, driven by this process."""
    monkeypatch.chdir(tmp_path)
    run = RunDirectory("mine", root=tmp_path / "runs")
    run.path.mkdir(parents=True)
    run.write_state(training())
    return run


def training() -> RunState:
    return first_state("mine", steps=50).model_copy(
        update={
            "phase": "training",
            "step": 7,
            "desired": {"actors": 4, "replicas": 1},
            "actual": {"actors": 3, "replicas": 1},
        }
    )


def answering(
    directory: RunDirectory, *answers: tuple[ScaleOutcome, str], phase: str = "training"
) -> threading.Thread:
    """A driver that takes the request and says `answers` one after the other."""

    def drive() -> None:
        while (request := take_scale_request(directory)) is None:
            time.sleep(0.01)
        for outcome, error in answers:
            answer = ScaleAnswer(id=request.id, outcome=outcome, error=error)
            state = training().model_copy(update={"scale": answer, "phase": phase})
            directory.write_state(state)
            time.sleep(0.2)

    driver = threading.Thread(target=drive)
    driver.start()
    return driver


def ask(directory: RunDirectory, *, answer_timeout_s: float = 5.0) -> str:
    request = ScaleRequest(actors=4)
    return scale(
        directory, request, answer_timeout_s=answer_timeout_s, scale_timeout_s=answer_timeout_s
    )


def test_a_request_is_taken_once_and_the_last_one_counts(directory: RunDirectory) -> None:
    assert take_scale_request(directory) is None
    post_scale_request(directory, ScaleRequest(actors=3))
    last = ScaleRequest(actors=2, replicas=5)
    post_scale_request(directory, last)
    assert take_scale_request(directory) == last
    assert take_scale_request(directory) is None
    assert last.numbers == {"actors": 2, "replicas": 5}
    assert ScaleRequest(replicas=1).numbers == {"replicas": 1}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("half a fi", "the file: "),
        ('{"id": "a", "actors": 0}', "actors: must be above 0"),
        ('{"id": "", "actors": 1}', "id: "),
        ('{"id": "a", "actor": 3}', "actor: is unknown"),
    ],
)
def test_a_file_that_is_no_request_is_refused_and_gone(
    directory: RunDirectory, text: str, named: str
) -> None:
    directory.scale_request.write_text(text)
    with pytest.raises(UserError, match=named):
        take_scale_request(directory)
    assert take_scale_request(directory) is None


def test_a_request_of_an_earlier_driver_is_forgotten(tmp_path: Path) -> None:
    run = RunDirectory("old", root=tmp_path)
    run.begin(resume=False)
    run.config_file.write_text("")
    post_scale_request(run, ScaleRequest(actors=3))
    run.end()
    run.begin(resume=True)
    assert take_scale_request(run) is None
    run.end()


def test_the_verb_waits_until_it_is_done(directory: RunDirectory) -> None:
    driver = answering(directory, ("under way", ""), ("under way", ""), ("done", ""))
    began = time.monotonic()
    assert ask(directory).startswith("run 'mine': actors 3/4, replicas 1/1 after ")
    assert time.monotonic() - began >= 0.4
    driver.join()


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        ([("refused", "needs 9 CPU")], UserError, "run 'mine': needs 9 CPU"),
        (
            [("under way", ""), ("given up", "actor-3: no place; given up")],
            UserError,
            r"actor-3: no place; given up \(actors 3/4, replicas 1/1\)",
        ),
        (
            [("under way", "")],
            UserError,
            r"took the request, but .* after 1 s: driver \d+ on .* was training at step 7 with "
            r"actors 3/4, replicas 1/1",
        ),
    ],
)
def test_the_verb_says_what_came_of_it(
    directory: RunDirectory,
    answers: list[tuple[ScaleOutcome, str]],
    error: type[Exception],
    said: str,
) -> None:
    driver = answering(directory, *answers)
    with pytest.raises(error, match=said):
        ask(directory, answer_timeout_s=1.0)
    driver.join()


def test_a_run_that_ends_meanwhile_is_not_waited_for(directory: RunDirectory) -> None:
    driver = answering(directory, ("under way", ""), phase="stopping")
    with pytest.raises(UserError, match="was stopping at step 7"):
        ask(directory, answer_timeout_s=60.0)
    driver.join()


def test_a_request_that_no_driver_takes_is_withdrawn(directory: RunDirectory) -> None:
    with pytest.raises(UserError, match=r"no answer .* within 0 s, so it was withdrawn"):
        ask(directory, answer_timeout_s=0.2)
    assert take_scale_request(directory) is None


def test_a_request_that_was_taken_and_not_answered_is_not_called_withdrawn(
    directory: RunDirectory,
) -> None:
    driver = answering(directory)
    with pytest.raises(UserError, match=r"no answer .*, but the driver has taken it and may yet"):
        ask(directory, answer_timeout_s=0.5)
    driver.join()


def test_two_do_not_scale_one_run_at_once(directory: RunDirectory) -> None:
    with (directory.path / "scale.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another 'amortize scale'"):
            ask(directory)
    assert take_scale_request(directory) is None


@pytest.mark.parametrize(
    "update", [{"phase": "done"}, {"phase": "evaluating"}, {"pid_started_s": 0.0}]
)
def test_a_run_that_does_not_train_is_refused_at_once(
    directory: RunDirectory, update: dict[str, object]
) -> None:
    directory.write_state(training().model_copy(update=update))
    with pytest.raises(UserError, match=r"cannot be scaled: .*--resume' takes cluster.actors=N"):
        ask(directory)


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", ""])
def test_a_number_that_is_none_is_a_usage_error(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["scale", "--run", "mine", f"--actors={number}"])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_a_request_for_nothing_is_refused(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", "--run", "mine"]) == 1
    assert "nothing to change: give --actors" in capsys.readouterr().err


def test_calls_are_held_until_the_last_has_ended() -> None:
    calls = CallCounter()
    assert calls.quiet_s() == float("inf")
    with calls.count(), calls.count():
        assert calls.quiet_s() == 0.0
    time.sleep(0.02)
    assert 0.02 <= calls.quiet_s() < 5.0
    with pytest.raises(KeyError), calls.count():
        raise KeyError
    assert calls.quiet_s() < 5.0
