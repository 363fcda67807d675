"""Finds the Redis of the inspected run: the driver's while that lives, else one started here."""

import contextlib
import socket

from buffer.connection import BufferUnreachable, connect
from buffer.folder import FolderInUse, configured_password
from buffer.server import NeverServed, RedisServer, reach
from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory

_PROBE_TIMEOUT_S = 2.0
_STOP_TIMEOUT_S = 30.0


class BufferKeeper:
    """Holds the address of the run's Redis; starts one on the run's files where no driver has one.

    A server that was started here is only read from, and ends with this object. While the driver
    lives, the server is the driver's, and nothing is started.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config = config.buffer
        self._directory = directory
        self._server: RedisServer | None = None

    def __enter__(self) -> "BufferKeeper":
        """Find the run's Redis, or start it.

        Raises:
            BufferUnreachable, NeverServed: the run should have a Redis, and has none that answers.
            FolderInUse, ForeignFolder, NoRedisServer, ...: it could not be started.
        """
        if self._config.kind == "memory":
            raise NeverServed(
                f'run {self._directory.name} keeps its buffer in memory (buffer.kind = "memory"), '
                "where nobody else can look: see its report, or train with a buffer in Redis"
            )
        try:
            self._connect()
        except (BufferUnreachable, NeverServed):
            if not self._is_ours_to_start():
                raise
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.stop(timeout_s=_STOP_TIMEOUT_S)

    @property
    def address(self) -> tuple[str, str | None]:
        """Address and password."""
        if self._config.url is None:
            return reach(self._directory.buffer, self._config)
        return self._config.url, configured_password(self._config)

    def watch(self) -> None:
        """Take over where a driver has ended since, and revive a server of ours that died."""
        if (self._server is not None and self._server.alive()) or not self._is_ours_to_start():
            return
        try:
            self._connect()
        except (BufferUnreachable, NeverServed):
            # The driver's may still be on its way out: then the next time.
            with contextlib.suppress(FolderInUse):
                self._start()

    def _start(self) -> None:
        folder, run = self._directory.buffer, self._directory.name
        self._server = RedisServer.start(folder, run=run, config=self._config)

    def _is_ours_to_start(self) -> bool:
        """Whether the files are a managed server's, and nobody drives the run."""
        if self._config.url is not None or not self._directory.buffer.is_dir():
            return False
        state = self._directory.state()
        if state is None or state.ended:
            return True
        return state.host == socket.gethostname() and state.driver() is None

    def _connect(self) -> None:
        url, password = self.address
        connect(url, password=password, timeout_s=_PROBE_TIMEOUT_S).close()
