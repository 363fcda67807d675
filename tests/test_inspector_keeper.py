"""Whose Redis the inspector reads: the driver's while it lives, else one of its own."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.connection import BufferUnreachable, connect
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import NeverServed, RedisServer
from cluster.config.project import UserError
from cluster.inspector.command import ray_address, the_run_of_interest
from cluster.inspector.keeper import BufferKeeper
from cluster.run.directory import RunDirectory, first_state
from tests.inspector_toy import config_of, filled, make_run, sums

ROOT = Path(__file__).resolve().parent.parent


def keeper_of(directory: RunDirectory) -> BufferKeeper:
    return BufferKeeper(config_of(directory), directory)


def stored(directory: RunDirectory, keeper: BufferKeeper) -> int:
    """Trajectories that are found where the keeper says."""
    url, password = keeper.address
    with connect(url, password=password, timeout_s=5.0) as client:
        config = config_of(directory).buffer
        return (
            ReplayBuffer(RedisStore(client, run=directory.name), config=config).stats().replay_size
        )


def silent(directory: RunDirectory) -> bool:
    """Whether nothing listens where the run's Redis was last."""
    url, password = keeper_of(directory).address
    try:
        connect(url, password=password, timeout_s=1.0).close()
    except BufferUnreachable:
        return True
    return False


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    """A run that has ended and left its files."""
    directory = make_run(tmp_path / "runs")
    with filled(directory, sums(9)):
        pass
    return directory


def test_a_finished_run_gets_a_redis_for_as_long_as_somebody_looks(
    finished: RunDirectory,
) -> None:
    assert silent(finished)
    with keeper_of(finished) as keeper:
        assert stored(finished, keeper) == 9
    assert silent(finished)


def test_the_redis_of_a_run_that_goes_on_is_used_and_left_alone(tmp_path: Path) -> None:
    directory = make_run(tmp_path, phase="training")
    with filled(directory, sums(5)) as (server, _):
        with keeper_of(directory) as keeper:
            assert keeper.address == (server.url, server.password)
            keeper.watch()
            assert stored(directory, keeper) == 5
        assert server.alive() and not silent(directory)


def test_nothing_is_started_while_the_driver_lives(tmp_path: Path) -> None:
    directory = make_run(tmp_path, phase="training")
    with pytest.raises(NeverServed, match="no redis-server was ever started"), keeper_of(directory):
        pass
    with filled(directory, []):
        pass
    with pytest.raises(BufferUnreachable, match="did not answer"), keeper_of(directory):
        pass
    assert silent(directory)


def test_nothing_is_started_for_a_driver_on_another_machine(finished: RunDirectory) -> None:
    state = finished.state()
    assert state is not None
    elsewhere = state.model_copy(update={"host": "another-machine", "phase": "training"})
    finished.write_state(elsewhere)
    with pytest.raises(BufferUnreachable, match="did not answer"), keeper_of(finished):
        pass


def test_the_files_are_taken_over_when_the_run_ends(tmp_path: Path) -> None:
    directory = make_run(tmp_path, phase="training")
    with filled(directory, sums(7)) as (server, _), keeper_of(directory) as keeper:
        state = directory.state()
        assert state is not None
        directory.write_state(state.model_copy(update={"phase": "done"}))
        keeper.watch()
        assert server.alive(), "it is the driver's for as long as it answers"
        server.stop(timeout_s=10.0)
        keeper.watch()
        assert stored(directory, keeper) == 7
        assert keeper.address == (server.url, server.password), "where clients look for it"


def test_a_driver_that_is_gone_without_a_word_leaves_its_files_to_us(
    finished: RunDirectory,
) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    state = finished.state()
    assert state is not None
    finished.write_state(state.model_copy(update={"phase": "training", "pid": child.pid}))
    with keeper_of(finished) as keeper:
        assert stored(finished, keeper) == 9


def test_the_run_that_is_shown_is_the_live_one_else_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs here yet"):
        the_run_of_interest()
    for name in ("first", "second"):
        make_run(tmp_path / "runs", name)
        time.sleep(0.01)
    assert the_run_of_interest().name == "second"
    make_run(tmp_path / "runs", "third")
    live = RunDirectory("first", root=tmp_path / "runs")
    live.write_state(first_state("first", steps=1))
    assert the_run_of_interest().name == "first"


def test_the_ray_cluster_is_the_run_s_while_it_goes_on(
    finished: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    state = finished.state()
    assert state is not None
    there = state.model_copy(update={"address": "10.0.0.1:6379"})
    assert ray_address(there.model_copy(update={"phase": "training"})) == "10.0.0.1:6379"
    assert ray_address(there) is None, "it has ended"
    assert ray_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert ray_address(there) == "auto"


@pytest.fixture
def inspecting(finished: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """`amortize inspect --no-serve` on the finished run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "inspect", "--run", finished.name, "--no-serve"],
        cwd=finished.path.parent.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_the_verb_shows_a_finished_run_without_ray_and_ends_in_order(
    finished: RunDirectory, inspecting: subprocess.Popen[str]
) -> None:
    assert inspecting.stdout is not None
    said = inspecting.stdout.readline()
    address = re.search(r"inspector of demo: (http://127\.0\.0\.1:\d+/inspect/demo/)\?token=", said)
    assert address is not None, said + inspecting.stdout.read()
    token = (finished.path / "inspector-token").read_text()
    request = urllib.request.Request(
        f"{address[1]}?sort=reward", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        page = answer.read().decode()
    assert "<b>9</b> trajectories in replay" in page
    inspecting.send_signal(signal.SIGINT)
    assert inspecting.wait(timeout=60.0) == 0
    assert silent(finished)
    config = config_of(finished).buffer
    RedisServer.start(finished.buffer, run=finished.name, config=config).stop(timeout_s=10.0)


def test_a_run_whose_buffer_was_in_memory_is_refused_in_a_sentence(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    config = config_of(directory).changed({"buffer.kind": "memory"})
    with pytest.raises(NeverServed, match="in memory"), BufferKeeper(config, directory):
        raise AssertionError("there is nothing to serve")
