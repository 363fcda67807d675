"""An address at which no Ray cluster answers: a deadline, which address, and what to do."""

import signal
import socket
import time

import pytest

from cluster.config.file import load_config
from cluster.config.project import UserError
from cluster.distributed.ray_cluster import check_reachable, connect_ray


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "http://127.0.0.1:6379", "127.0.0.1", "no.such.host.invalid:6379"]
)
def test_it_is_refused_at_once(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=f"at '{address}' .*--address.*RAY_ADDRESS"):
        connect_ray(load_config("tasks/toy.toml"), address, "test")
    assert time.monotonic() - began < 10


def test_one_that_accepts_and_says_nothing_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(UserError, match=f"at '{address}' .no answer within 1 s"):
            check_reachable(address, timeout_s=1.0)


def test_what_ray_looks_up_itself_is_left_to_ray() -> None:
    check_reachable("auto")


def test_ray_does_not_take_the_request_to_stop_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        wanted = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        connect_ray(load_config("tasks/toy.toml"), None, "test")
        assert signal.getsignal(signal.SIGTERM) is wanted
    finally:
        signal.signal(signal.SIGTERM, ours)
