"""Every way of not reaching Redis has its own error."""

import os
import pickle
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from buffer.config import BufferConfig
from buffer.connection import (
    BufferUnreachable,
    NotOurRedis,
    WrongPassword,
    connect,
    redacted,
)
from buffer.endpoint import CannotListen
from buffer.executable import NoRedisServer
from buffer.folder import FolderInUse, ForeignFolder
from buffer.redis_store import ForeignKeys, RedisStore
from buffer.replay import BufferContended, BufferStarved, ReplayBuffer
from buffer.server import NeverServed, ServerFailed
from tests.buffer_toy import serving, toy_trajectory

ROOMY = BufferConfig(capacity=10**6, quota_per_prompt=10**6, near_duplicate_tolerance=0)


@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_wrong_password_is_named_and_not_shown(tmp_path: Path, password: str | None) -> None:
    with serving(tmp_path) as (server, _):
        with pytest.raises(WrongPassword, match=r"buffer\.password") as caught:
            connect(server.url, password=password, timeout_s=5.0)
        assert server.url.split("/")[2] in str(caught.value)
        with pytest.raises(WrongPassword) as caught:
            connect(server.url.replace("//", "//:hunter2@"), password=None, timeout_s=5.0)
        assert "hunter2" not in str(caught.value)


def test_an_address_where_nothing_listens_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    started_s = time.monotonic()
    with pytest.raises(BufferUnreachable, match=f"127.0.0.1:{port}/0 did not answer while conn"):
        connect(f"redis://127.0.0.1:{port}/0", password=None, timeout_s=30.0)
    assert time.monotonic() - started_s < 10.0


def test_a_silent_server_is_given_up_after_the_time_limit() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(BufferUnreachable, match=r"after (?!0\.[01])\d+\.\d s"),
    ):
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        connect(url, password=None, timeout_s=0.2)


def test_a_server_lost_for_good_ends_in_a_named_error(tmp_path: Path) -> None:
    with (
        serving(tmp_path) as (server, _),
        connect(server.url, password=server.password, timeout_s=2.0) as client,
    ):
        buffer = ReplayBuffer(RedisStore(client, run="toy"), config=ROOMY)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(BufferUnreachable, match="did not answer while running"):
            buffer.add([toy_trajectory()])


def test_another_service_on_the_port_is_not_taken_for_redis() -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:

        def serve() -> None:
            connection, _ = web.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NotOurRedis, match="not as Redis does"):
            connect(f"redis://127.0.0.1:{web.getsockname()[1]}/0", password=None, timeout_s=5.0)
        thread.join(timeout=5.0)


def test_an_address_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"buffer\.url 'http://\*\*\*@x' is no Redis address"):
        connect("http://me:hunter2@x", password=None, timeout_s=1.0)
    assert redacted("redis://me:p@ss@host:1/0") == "redis://***@host:1/0"


def test_every_error_pickles() -> None:
    kinds = (
        *(BufferUnreachable, WrongPassword, NotOurRedis, NoRedisServer, FolderInUse),
        *(ForeignFolder, BufferContended, CannotListen, BufferStarved),
        *(ServerFailed, NeverServed, ForeignKeys),
    )
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind("what, where, remedy")))
        assert (type(again), str(again)) == (kind, "what, where, remedy")
