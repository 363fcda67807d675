"""The folder of a managed redis-server: whose it is, who uses it now, and what it remembers.

owner.json      run, Redis version that wrote the data, port of the last start
password        the server's password, readable by its owner only
redis.conf      written anew at each start (it holds the password, so it is private too)
redis.log       appendonly.aof or appendonlydir/       lock (held while a server runs)
"""

import fcntl
import json
import os
import secrets
import stat
import time
from pathlib import Path
from typing import NamedTuple

from buffer.config import PASSWORD_VARIABLE, BufferConfig
from buffer.connection import WrongPassword
from buffer.executable import Executable

LOCK_TIMEOUT_S = 3.0
POLL_S = 0.02


class ForeignFolder(ValueError):
    """The folder holds the data of another run, of a newer Redis, or of something unknown."""


class FolderInUse(RuntimeError):
    """A redis-server runs on this folder."""


class Owner(NamedTuple):
    """Content of owner.json."""

    run: str
    redis: tuple[int, int]
    port: int


def claim_folder(folder: Path, *, run: str, executable: Executable) -> Owner:
    """Make the folder this run's, or find it to be; raises ForeignFolder.

    An older Redis does not see a newer one's log and would start empty, so it is refused as well.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / "owner.json").exists():
        if any(folder.glob("appendonly*")):
            raise ForeignFolder(
                f"{folder} holds a Redis log without owner.json: it is not this program's."
                " Choose another run name, or move the log away"
            )
        return write_owner(folder, Owner(run, executable.version, 0))
    found = read_owner(folder)
    if found.run != run:
        raise ForeignFolder(
            f"{folder} holds the buffer of run {found.run!r}, not of {run!r}."
            " Choose another folder, or resume that run"
        )
    if found.redis > executable.version:
        raise ForeignFolder(
            f"{folder} was written by Redis {found.redis[0]}.{found.redis[1]}, but"
            f" {executable.path} is {executable.version[0]}.{executable.version[1]} and may not"
            " read it. Install the newer one"
        )
    return write_owner(folder, Owner(run, executable.version, found.port))


def read_owner(folder: Path) -> Owner:
    """Content of owner.json; raises ForeignFolder for a damaged one."""
    try:
        fields = json.loads((folder / "owner.json").read_text())
        return Owner(str(fields["run"]), tuple(fields["redis"]), int(fields["port"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ForeignFolder(f"{folder}/owner.json is damaged ({error!r}); restore it") from error


def write_owner(folder: Path, owner: Owner) -> Owner:
    """Write owner.json, whole or not at all."""
    draft = folder / "owner.json.new"
    draft.write_text(json.dumps(owner._asdict()))
    draft.replace(folder / "owner.json")
    return owner


def lock_folder(folder: Path) -> int:
    """A file descriptor that holds the folder's lock; whoever inherits it holds it too."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S  # a server that was killed needs a moment
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() < deadline_s:
                time.sleep(POLL_S)
                continue
            os.close(descriptor)
            raise FolderInUse(
                f"a redis-server still runs on {folder} after {LOCK_TIMEOUT_S} s."
                " Stop its run, or the inspector that shows it, or choose another run name"
            ) from None


def configured_password(config: BufferConfig) -> str | None:
    """The password of the environment, else of the file that the configuration names, else None."""
    if password := os.environ.get(PASSWORD_VARIABLE):
        return password
    if config.password_file is None:
        return None
    path = Path(config.password_file).expanduser()
    try:
        readable_by_all = path.stat().st_mode & stat.S_IROTH
        password = path.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise WrongPassword(f"buffer.password_file: {path} cannot be read: {why}") from None
    if readable_by_all:
        raise WrongPassword(
            f"buffer.password_file: everybody on this machine may read {path}: chmod 600 it "
            "(defaultMode: 0400 of a Kubernetes secret)"
        )
    if not password:
        raise WrongPassword(f"buffer.password_file: {path} is empty")
    return password


def keep_password(folder: Path, wanted: str | None) -> str:
    """The wanted password, else the folder's own, else a new one; kept in the folder."""
    path = folder / "password"
    if wanted is None and path.exists():
        return path.read_text()
    password = wanted or secrets.token_urlsafe(24)
    write_private(path, password)
    return password


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, at no moment otherwise."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
