"""The run's Redis from the driver's side: kept alive, watched, and asked what is in it."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

from buffer.connection import BufferUnreachable, redacted
from buffer.folder import configured_password
from buffer.memory import MemoryStore
from buffer.server import RedisServer, ServerFailed
from buffer.stats import ReplayStats
from buffer.trajectory import Trajectory
from cluster.config.schema import RunConfig
from cluster.run.assembly import build_buffer
from cluster.run.awake import awake_s
from cluster.run.directory import RunDirectory
from cluster.run.display import first_line
from cluster.run.session import BufferAddress

_STOP_S = 30.0
_LOG_LINES = 3
_POLL_S = 0.2
_PROBE_S = 1.0
_STATS_S = 2.0  # for an answer, before the last one is repeated
_PAUSE_S = 1.0  # before a second start in a row; it doubles with each
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0  # who lived for so long did not die of what ended the one before


class OwnBuffer:
    """The run's Redis: one that the run keeps alive, or an external one, which is its owner's.

    A server of the run that dies is started again on its files and its port, as any other part up
    to `cluster.max_restarts` times; one that does not answer for `cluster.silence_timeout_s` is
    killed first. Each further start in a row waits for longer: a disk may be full for a moment
    only. It is kept alive to the very end: who ends a run often signals all of its processes at
    once (`ray job stop`, systemd, Slurm), and an orderly stop still needs the buffer.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config = config
        self._directory = directory
        self._server = self._start() if config.buffer.url is None else None
        self._event = ""
        self._failure: Exception | None = None
        self._deaths = self._deaths_in_a_row = 0
        self._started_s = awake_s()
        self._last_error = ""
        self._stopping = threading.Event()
        self._wanted, self._answered = threading.Event(), threading.Event()
        try:
            self._replay = build_buffer(config, run=directory.name, place=self.address)
            self._stats = self._replay.stats()
        except BaseException:
            self._end_server()
            raise
        self._answered_s = awake_s()
        self._keeper = threading.Thread(target=self._keep_alive, name="buffer", daemon=True)
        self._keeper.start()
        threading.Thread(target=self._probe, name="buffer-probe", daemon=True).start()

    @property
    def address(self) -> BufferAddress:
        if self._server is not None:
            return BufferAddress(url=self._server.url, password=self._server.password)
        config = self._config.buffer
        return BufferAddress(url=str(config.url), password=configured_password(config))

    def revived(self) -> str:
        """Why the server was started again since the last call; empty if it was not.

        Raises what kept it from starting, or BufferUnreachable for an external one that is silent.
        """
        if self._failure is not None:
            raise self._failure
        event, self._event = self._event, ""
        return event

    def stats(self) -> ReplayStats:
        """What is in the buffer now; while it does not answer, what it said last."""
        self._answered.clear()
        self._wanted.set()
        self._answered.wait(_STATS_S)
        return self._stats

    def newest(self) -> Sequence[Trajectory]:
        """See `ReplayBuffer.newest`."""
        return self._replay.newest()

    def close(self) -> None:
        """End the server in order; its files stay."""
        self._stopping.set()
        self._keeper.join()
        self._wanted.set()
        self._end_server()

    def _keep_alive(self) -> None:
        """Start a server again that died, or that had to be killed because it was silent."""
        limit_s = self._config.cluster.silence_timeout_s
        silent = False
        while not self._stopping.wait(_POLL_S):
            now = awake_s()
            try:
                if self._server is not None and not self._server.alive():
                    why = f"did not answer for {limit_s:.0f} s and was killed" if silent else "died"
                    self._event = self._start_again(why)
                    silent = False
                elif now - self._answered_s > limit_s and not silent:
                    silent = True
                    self._end_silent(limit_s)
            except Exception as error:  # the driver's to report, in its own thread
                self._failure = error
                return

    def _start_again(self, why: str) -> str:
        """Start the server on its files, at once or after a pause; what became of it, for people.

        Raises ServerFailed after more deaths than `cluster.max_restarts`.
        """
        self._count_death()
        pause_s = min(_PAUSE_S * (2 ** (self._deaths_in_a_row - 1) - 1), _LONGEST_PAUSE_S)
        self._stopping.wait(pause_s)
        self._started_s = awake_s()
        try:
            self._server = self._start()
        except (OSError, ServerFailed) as error:
            return f"redis-server {why} and could not be started: {first_line(error)}"
        self._answered_s = awake_s()
        return f"redis-server {why}; started again on its files"

    def _count_death(self) -> None:
        self._deaths += 1
        steady = awake_s() - self._started_s > _STEADY_S
        self._deaths_in_a_row = 1 if steady else self._deaths_in_a_row + 1
        if self._deaths > (limit := self._config.cluster.max_restarts):
            log = (self._directory.buffer / "redis.log").read_text(errors="replace")
            raise ServerFailed(
                f"redis-server died {self._deaths} times (cluster.max_restarts = {limit}); "
                f"redis.log ends with: {' / '.join(log.splitlines()[-_LOG_LINES:])}"
            )

    def _end_silent(self, limit_s: float) -> None:
        if self._server is None:
            raise BufferUnreachable(
                f"Redis at {redacted(self.address.url)} did not answer for {limit_s:.0f} s "
                f"(cluster.silence_timeout_s): {self._last_error or 'it is silent'}"
            )
        with suppress(ProcessLookupError):
            os.kill(self._server.pid, signal.SIGKILL)

    def _probe(self) -> None:
        """Ask for the stats once a second, and whenever the driver wants them."""
        while not self._stopping.is_set():
            self._wanted.wait(_PROBE_S)
            self._wanted.clear()
            try:
                self._stats = self._replay.stats()
            except Exception as error:  # the keeper judges it by its silence
                self._last_error = first_line(error)
                continue
            self._answered_s = awake_s()
            self._answered.set()

    def _start(self) -> RedisServer:
        folder, run = self._directory.buffer, self._directory.name
        return RedisServer.start(folder, run=run, config=self._config.buffer)

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.stop(timeout_s=_STOP_S)


class MemoryBuffer:
    """A buffer in the process of the run: nothing to keep alive."""

    def __init__(self, config: RunConfig) -> None:
        self.address = BufferAddress(memory=MemoryStore())
        replay = build_buffer(config, run="", place=self.address)
        self.stats, self.newest = replay.stats, replay.newest

    def revived(self) -> str:
        """It never is."""
        return ""


RunBuffer = OwnBuffer | MemoryBuffer


@contextmanager
def buffer_server(config: RunConfig, directory: RunDirectory) -> Iterator[RunBuffer]:
    """The run's buffer, for as long as the run lasts."""
    if config.buffer.kind == "memory":
        yield MemoryBuffer(config)
    else:
        with closing(OwnBuffer(config, directory)) as buffer:
            yield buffer
