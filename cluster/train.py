"""The verb `train`: brings a run up, watches it, measures it before and after, leaves it whole."""

import argparse
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from buffer.server import RedisServer
from cluster.conclusion import conclude
from cluster.config import RunConfig
from cluster.config_file import load_config, resolved_toml
from cluster.driver import Driver
from cluster.preflight import check_before_start
from cluster.roles import build_buffer
from cluster.rundir import RunDirectory, new_name, write_whole
from cluster.session import BufferAddress, LocalSession, RaySession, Session
from cluster.terminal import Terminal

_BUFFER_STOP_S = 30.0


def run(arguments: argparse.Namespace) -> int:
    """Train; exit status 0 when the run is done or was stopped on request."""
    config = load_config(arguments.config, arguments.overrides)
    directory = RunDirectory(arguments.run or new_name(config.task.name))
    address = arguments.address or config.cluster.address or os.environ.get("RAY_ADDRESS")
    check_before_start(
        config,
        directory,
        resume=arguments.resume,
        address=None if arguments.local else address,
        local=arguments.local,
    )
    directory.begin(resume=arguments.resume)
    try:
        write_whole(directory.config_file, resolved_toml(config))
        with Terminal() as terminal, buffer_server(config, directory) as buffer:
            session: Session = (
                LocalSession(config, directory, buffer.address)
                if arguments.local
                else RaySession(config, directory, buffer.address, address=address)
            )
            driver = Driver(
                config,
                directory,
                session,
                terminal,
                revive_buffer=buffer.revive,
                buffer_size=buffer.size,
            )
            with stop_on_signal(driver.request_stop):
                scores = driver.drive()
        conclude(config, directory, scores)
    finally:
        directory.end()
    return 0


class OwnBuffer:
    """The run's Redis: one that the run keeps alive, or an external one, which is its owner's."""

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config = config
        self._directory = directory
        self._server = self._start() if config.buffer.url is None else None
        self._replay = build_buffer(
            config, run=directory.name, url=self.address.url, password=self.address.password
        )

    @property
    def address(self) -> BufferAddress:
        """Where clients connect."""
        if self._server is not None:
            return BufferAddress(url=self._server.url, password=self._server.password)
        secret = self._config.buffer.password
        return BufferAddress(
            url=str(self._config.buffer.url),
            password=None if secret is None else secret.get_secret_value(),
        )

    def revive(self) -> bool:
        """Start a server that died again, on its files and its port; whether that was needed."""
        if self._server is None or self._server.alive():
            return False
        self._server = self._start()
        return True

    def size(self) -> int:
        """Trajectories in replay now."""
        return self._replay.stats().replay_size

    def stop(self) -> None:
        """End the server in order; its files stay."""
        if self._server is not None:
            self._server.stop(timeout_s=_BUFFER_STOP_S)

    def _start(self) -> RedisServer:
        return RedisServer.start(
            self._directory.buffer, run=self._directory.name, config=self._config.buffer
        )


@contextmanager
def buffer_server(config: RunConfig, directory: RunDirectory) -> Iterator[OwnBuffer]:
    """The run's Redis, for as long as the run lasts."""
    buffer = OwnBuffer(config, directory)
    try:
        yield buffer
    finally:
        buffer.stop()


@contextmanager
def stop_on_signal(request_stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for an orderly stop; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        request_stop()

    previous = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
