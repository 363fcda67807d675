"""The redis-server that belongs to a run: started with it, ended with it, its files kept."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from buffer import watchdog
from buffer.config import BufferConfig
from buffer.connection import BufferUnreachable, WrongPassword, connect, durability
from buffer.endpoint import CannotListen, configuration, listening_url, ports
from buffer.executable import find_executable
from buffer.folder import (
    Owner,
    claim_folder,
    configured_password,
    keep_password,
    lock_folder,
    read_owner,
    write_owner,
    write_private,
)

POLL_S = 0.02
LOG_TAIL = 600
KILLED_S = 10.0  # for the watchdog to see that its killed server has ended


class ServerFailed(RuntimeError):
    """The managed redis-server did not start or stop as it should, or not in time."""


class NeverServed(FileNotFoundError):
    """No redis-server was ever started on the folder."""


@dataclass(frozen=True, slots=True, eq=False)
class RedisServer:
    """A redis-server that syncs every write to disk before it answers.

    It ends when this process ends, however that happens, and keeps its folder; started again on
    it, it holds everything that was acknowledged, on the same port if that is still free.
    """

    watchdog: subprocess.Popen[bytes]
    url: str
    password: str = field(repr=False)
    pid: int  # of redis-server itself

    @classmethod
    def start(
        cls, folder: Path, *, run: str, config: BufferConfig, timeout_s: float = 60.0
    ) -> Self:
        """Start on a folder, new or of the same run, and wait until it answers."""
        folder = folder.resolve()
        executable = find_executable()
        owner = claim_folder(folder, run=run, executable=executable)
        lock, log = lock_folder(folder), folder / "redis.log"
        log.touch()
        try:
            password = keep_password(folder, configured_password(config))
            for port in ports(config, last=owner.port):
                url = listening_url(folder, config, port)
                settings = configuration(folder, config, port=port, password=password)
                write_private(folder / "redis.conf", settings)
                logged = log.stat().st_size
                process = spawn([executable.path, str(folder / "redis.conf")], folder, lock)
                pid = wait_until_ready(process, url, password, timeout_s)
                if pid is not None:
                    write_owner(folder, Owner(run, executable.version, port))
                    return cls(process, url, password, pid)
                tail = log.read_bytes()[logged:].decode(errors="replace")
                if "Address already in use" not in tail:
                    raise ServerFailed(
                        f"{executable.path} ended with status {process.returncode} while starting"
                        f" on {folder}; redis.log says: {tail[-LOG_TAIL:] or 'nothing'}"
                    )
            raise CannotListen(
                f"another program took port {port} of {config.address} before redis-server had it."
                " Set buffer.port to a free one, or to 0 to have one chosen"
            )
        finally:
            # The server's watchdog holds the lock from here on.
            os.close(lock)

    def alive(self) -> bool:
        """Whether the server process runs; whether it answers is for `connect` to find out."""
        return self.watchdog.poll() is None

    def stop(self, *, timeout_s: float) -> None:
        """End it in order. Raises ServerFailed after killing one that does not end."""
        self.watchdog.terminate()
        try:
            self.watchdog.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.watchdog.wait(timeout=KILLED_S)
            raise ServerFailed(
                f"redis-server {self.pid} at {self.url} did not stop within {timeout_s} s and was"
                " killed; what it had acknowledged is on disk"
            ) from None


def reach(folder: Path, config: BufferConfig) -> tuple[str, str]:
    """Address and password of the server that runs on a folder, or ran there last."""
    folder = folder.resolve()
    try:
        owner, password = read_owner(folder), (folder / "password").read_text()
    except FileNotFoundError:
        raise NeverServed(
            f"no redis-server was ever started on {folder}; wait until its run has one"
        ) from None
    return listening_url(folder, config, owner.port), password


def spawn(command: list[str], folder: Path, lock: int) -> subprocess.Popen[bytes]:
    """Start a server under a watchdog that holds the folder's lock."""
    with (folder / "redis.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock],
            # Ctrl-C in the terminal is the run's to handle, not the server's.
            start_new_session=True,
        )


def wait_until_ready(
    process: subprocess.Popen[bytes], url: str, password: str, timeout_s: float
) -> int | None:
    """Process id of the server once it answers, None if it ended; after an error it is ended."""
    deadline_s = time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            # A refusal comes from whoever took the port; ours is about to end.
            with (
                contextlib.suppress(BufferUnreachable, WrongPassword),
                connect(url, password=password, timeout_s=timeout_s) as client,
            ):
                if (found := durability(client)) != "always":
                    raise ServerFailed(f"redis-server at {url} runs with appendfsync {found}")
                return int(client.info("server")["process_id"])
            if time.monotonic() > deadline_s:
                raise ServerFailed(
                    f"redis-server at {url} did not answer within {timeout_s} s of its start;"
                    " a long log takes longer to read: raise the limit"
                )
            time.sleep(POLL_S)
    except BaseException:
        process.terminate()
        process.wait(timeout=timeout_s)
        raise
    return None
