"""The folder of a run: who may write in it, and what a reader sees."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from cluster.commands.stop import stop, the_live_run
from cluster.config.project import UserError
from cluster.run.directory import (
    RunDirectory,
    RunState,
    all_runs,
    find_run,
    first_state,
    new_name,
    write_whole,
)
from cluster.run.display import phase

ROOT = Path(__file__).resolve().parent.parent

# A driver that ends in order on SIGINT, or that hears nothing.
DRIVER = """
import signal, sys, time
from pathlib import Path
from cluster.run.directory import RunDirectory, first_state

name, manners = sys.argv[1:]
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1) if manners == "polite" else None)
run = RunDirectory(name)
run.begin(resume=False)
state = first_state(name, steps=10).model_copy(update={"phase": "training", "step": 4})
run.write_state(state)
print("up", flush=True)
while not stopped:
    time.sleep(0.01)
assert run.stop_request.exists()
run.write_state(state.model_copy(update={"phase": "stopped", "killed": ("actor-1",)}))
"""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start_driver(name: str, manners: str) -> subprocess.Popen[str]:
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), name, manners],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "up\n"
    return driver


def end(driver: subprocess.Popen[str]) -> None:
    driver.kill()
    driver.communicate()


def test_a_new_run_needs_a_free_name_and_a_resumed_one_a_run() -> None:
    with pytest.raises(UserError, match=r"no run 'a' in .* to resume; it has: none"):
        RunDirectory("a").begin(resume=True)
    run = RunDirectory("a")
    run.begin(resume=False)
    run.config_file.write_text("")
    run.end()
    with pytest.raises(UserError, match="add --resume"):
        RunDirectory("a").begin(resume=False)
    again = RunDirectory("a")
    again.begin(resume=True)
    again.end()


def test_two_drivers_cannot_have_one_run() -> None:
    first = RunDirectory("a")
    first.begin(resume=False)
    first.config_file.write_text("")
    with pytest.raises(UserError, match="amortize stop --run a"):
        RunDirectory("a").begin(resume=True)
    first.end()
    second = RunDirectory("a")
    second.begin(resume=True)
    second.end()


def test_a_live_driver_is_named_before_anything_starts() -> None:
    driver = start_driver("a", "polite")
    try:
        RunDirectory("a").config_file.write_text("")
        with pytest.raises(UserError, match=f"process {driver.pid}"):
            RunDirectory("a").check(resume=True)
    finally:
        end(driver)
    RunDirectory("a").check(resume=True)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-dash", "a b", "x" * 101])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        RunDirectory(name)


def test_a_stop_request_of_an_earlier_driver_is_forgotten() -> None:
    run = RunDirectory("a")
    run.begin(resume=False)
    run.config_file.write_text("")
    run.stop_request.touch()
    run.end()
    run.begin(resume=True)
    assert not run.stop_request.exists()
    run.end()


def test_new_names_do_not_collide() -> None:
    first = new_name("arithmetic")
    (Path("runs") / first).mkdir(parents=True)
    second = new_name("arithmetic")
    assert first.startswith("arithmetic-20") and second != first
    RunDirectory(second)


def test_a_reader_never_sees_half_a_state() -> None:
    run = RunDirectory("a")
    run.path.mkdir(parents=True)
    small = first_state("a", steps=1)
    large = small.model_copy(update={"message": "x" * 200_000})
    done = threading.Event()
    unreadable: list[int] = []
    run.write_state(small)

    def read() -> None:
        while not done.is_set():
            if run.state() is None:
                unreadable.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for state in [small, large] * 100:
        run.write_state(state)
    done.set()
    reader.join()
    assert not unreadable
    assert [path.name for path in run.path.iterdir()] == ["state.json"]


def test_a_damaged_state_reads_as_none() -> None:
    run = RunDirectory("a")
    run.path.mkdir(parents=True)
    assert run.state() is None
    write_whole(run.state_file, '{"run": "a"')
    assert run.state() is None


def test_a_pid_that_was_given_to_another_program_is_no_driver() -> None:
    state = first_state("a", steps=1)
    assert state.driver() is not None
    earlier = state.model_copy(update={"pid_started_s": state.pid_started_s - 60})
    assert earlier.driver() is None
    assert phase(earlier).startswith("starting? (no driver")
    elsewhere = state.model_copy(update={"host": "another-machine"})
    assert elsewhere.driver() is None


def test_runs_are_found_oldest_first_and_missing_ones_listed() -> None:
    for name, started_s in (("late", 2.0), ("early", 1.0)):
        run = RunDirectory(name)
        run.path.mkdir(parents=True)
        run.write_state(
            first_state(name, steps=1).model_copy(update={"started_s": started_s, "phase": "done"})
        )
    assert [run.name for run in all_runs()] == ["early", "late"]
    with pytest.raises(UserError, match=r"did you mean early\? it has: early, late"):
        find_run("erly")


def test_stop_waits_for_an_orderly_end_and_says_what_was_killed() -> None:
    driver = start_driver("a", "polite")
    try:
        live = the_live_run()
        assert live is not None and live.name == "a"
        said = stop(live, timeout_s=20)
        assert said == "run 'a': stopped at step 4; had to be killed: actor-1"
        assert "has ended already" in stop(live, timeout_s=20)
        assert the_live_run() is None
    finally:
        end(driver)


def test_stop_names_a_driver_that_does_not_end() -> None:
    driver = start_driver("a", "deaf")
    try:
        with pytest.raises(UserError, match=f"within 0 s: driver {driver.pid} on .* training"):
            stop(RunDirectory("a"), timeout_s=0.3)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert "no driver any more: it died at step 4" in stop(RunDirectory("a"), timeout_s=5)
    finally:
        end(driver)


def test_stop_tells_at_once_why_a_state_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.commands.status._REWRITTEN_S", 0.1)
    run = RunDirectory("a")
    run.path.mkdir(parents=True)
    elsewhere = first_state("a", steps=1).model_copy(update={"host": "another-machine"})

    def spoil() -> None:
        while not run.stop_request.exists():
            time.sleep(0.01)
        run.state_file.write_text('{"run": "a"')

    run.write_state(elsewhere)
    spoiler = threading.Thread(target=spoil)
    spoiler.start()
    began_s = time.monotonic()
    with pytest.raises(UserError, match=r"'a': .*state\.json cannot be read \(the file: "):
        stop(run, timeout_s=20)
    assert time.monotonic() - began_s < 5
    spoiler.join()
    run.state_file.write_text(elsewhere.model_dump_json().replace("starting", "asleep"))
    with pytest.raises(UserError, match=r"cannot be read \(phase: must be "):
        stop(run, timeout_s=20)
    run.state_file.unlink()
    run.state_file.mkdir()
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        stop(run, timeout_s=20)
    assert run.state() is None


def test_stop_does_not_signal_a_process_that_is_not_the_driver() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run = RunDirectory("a")
        run.path.mkdir(parents=True)
        state: RunState = first_state("a", steps=1).model_copy(
            update={"pid": bystander.pid, "pid_started_s": 1.0}
        )
        run.write_state(state)
        assert "no driver any more" in stop(run, timeout_s=5)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_stop_asks_which_of_several() -> None:
    drivers = [start_driver(name, "polite") for name in ("a", "b")]
    try:
        with pytest.raises(UserError, match="a, b"):
            the_live_run()
    finally:
        for driver in drivers:
            end(driver)
