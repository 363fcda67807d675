"""The run's Redis from the driver's side: where it listens, and how it outlives what hits it."""

import contextlib
import errno
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.server import RedisServer
from cluster.config.file import load_config
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.distributed import ray_cluster as joining
from cluster.distributed.worker import interface_of, pin_interface
from cluster.run.directory import RunDirectory, check_shared
from cluster.run.own_buffer import buffer_server

TIMEOUT_S = 30.0


@pytest.fixture
def config() -> RunConfig:
    return load_config("tasks/arithmetic.toml")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory("test", root=tmp_path)


def test_the_buffer_is_there_again_for_the_stop_when_all_of_a_jobs_processes_are_signalled(
    config: RunConfig, directory: RunDirectory
) -> None:
    others = set(psutil.Process().children(recursive=True))
    with buffer_server(config, directory) as buffer:
        address = buffer.address
        with connect(address.url, password=address.password, timeout_s=TIMEOUT_S) as client:
            client.set("acknowledged", 1)
            before = client.info("server")["process_id"]
        # As `ray job stop` does. One that ends takes others with it.
        for child in set(psutil.Process().children(recursive=True)) - others:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + TIMEOUT_S
        while not buffer.revived():  # nobody else does anything about it
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert buffer.revived() == "" and buffer.address == address
        with connect(address.url, password=address.password, timeout_s=TIMEOUT_S) as client:
            assert client.get("acknowledged") == b"1"
            assert client.info("server")["process_id"] != before
    assert not psutil.pid_exists(before)


def test_a_server_that_does_not_answer_is_replaced_and_its_clients_notice_nothing(
    directory: RunDirectory,
) -> None:
    config = load_config("tasks/arithmetic.toml", ["cluster.silence_timeout_s=2"])
    with buffer_server(config, directory) as buffer:
        address, before = buffer.address, buffer.stats()
        with connect(address.url, password=address.password, timeout_s=TIMEOUT_S) as client:
            client.set("acknowledged", 1)
            silent = int(client.info("server")["process_id"])
            os.kill(silent, signal.SIGSTOP)
            assert buffer.stats() == before  # the driver is not held up
            assert client.get("acknowledged") == b"1"
            assert int(client.info("server")["process_id"]) != silent
        # The new server answers a moment before whoever started it notes that.
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (event := buffer.revived()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert event == "redis-server did not answer for 2 s and was killed; " + (
            "started again on its files"
        )
        assert buffer.address == address and buffer.revived() == ""
    assert not psutil.pid_exists(silent)


def test_a_buffer_that_cannot_come_back_is_the_drivers_to_report(
    config: RunConfig, directory: RunDirectory
) -> None:
    others = set(psutil.Process().children(recursive=True))
    with buffer_server(config, directory) as buffer:
        (directory.buffer / "owner.json").write_text("{}")
        for child in set(psutil.Process().children(recursive=True)) - others:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        deadline = time.monotonic() + TIMEOUT_S
        with pytest.raises(ValueError, match=r"owner\.json is damaged"):
            while time.monotonic() < deadline:
                buffer.revived()
                time.sleep(0.05)


def test_a_server_that_cannot_start_is_given_more_and_more_time(
    config: RunConfig, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run.own_buffer._PAUSE_S", 0.1)
    with buffer_server(config, directory) as buffer:
        whole, tried_s = RedisServer.start, []

        def start(*where: Any, **how: Any) -> RedisServer:
            tried_s.append(time.monotonic())
            if len(tried_s) < 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "owner.json")
            return whole(*where, **how)

        monkeypatch.setattr(RedisServer, "start", start)
        with connect(
            buffer.address.url, password=buffer.address.password, timeout_s=TIMEOUT_S
        ) as client:
            os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)
        said, deadline = [], time.monotonic() + TIMEOUT_S
        while "redis-server died; started again on its files" not in said:
            assert time.monotonic() < deadline
            said += [event] if (event := buffer.revived()) else []
            time.sleep(0.01)
        assert "could not be started: [Errno 28] No space left on device" in said[0]
        pauses = [later - earlier for earlier, later in itertools.pairwise(tried_s)]
        assert pauses[0] < pauses[1] < pauses[2] and pauses[2] > 0.7, pauses


def test_without_a_cluster_the_buffer_listens_on_loopback(
    config: RunConfig, directory: RunDirectory
) -> None:
    with buffer_server(config, directory) as buffer:
        assert buffer.address.url.startswith("redis://127.0.0.1:")


def test_on_a_cluster_the_buffer_listens_where_ray_knows_the_node(
    config: RunConfig, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "connect_ray", lambda *_: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")
    joined = joining.join_cluster(config, "10.0.0.1:6379", "test")
    with buffer_server(joined, directory) as buffer:
        assert buffer.address.url.startswith("redis://127.0.0.2:")


def test_an_address_that_was_configured_stands(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "connect_ray", lambda *_: None)
    configured = load_config("tasks/arithmetic.toml", ["buffer.bind=127.0.0.3"])
    assert joining.join_cluster(configured, "10.0.0.1:6379", "test") == configured
    assert BufferConfig().address == "127.0.0.1"


# --- what else a run needs on nodes that are not one machine


def test_a_run_in_a_jobs_copy_of_the_code_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "_ray_pkg_0123" / "runs"
    with pytest.raises(UserError, match="set AMORTIZE_RUNS"):
        RunDirectory("first", root=copy).begin(resume=False)
    assert not copy.exists()


def test_a_node_that_does_not_see_the_runs_folder_is_named(directory: RunDirectory) -> None:
    directory.begin(resume=False)
    with pytest.raises(UserError, match=r"10\.0\.0\.7 does not see .*AMORTIZE_RUNS"):
        check_shared(directory.path, node="10.0.0.7")
    directory.config_file.write_text("")
    check_shared(directory.path, node="10.0.0.7")
    directory.end()


def test_gloo_and_nccl_are_held_to_the_interface_of_the_nodes_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever happens in between
        monkeypatch.delenv(name)
    loopback = interface_of("127.0.0.1")
    assert loopback is not None and interface_of("192.0.2.99") is None
    pin_interface("192.0.2.99")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    pin_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={loopback}"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    pin_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
