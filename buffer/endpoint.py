"""Where a managed redis-server listens, and the configuration that makes it do so."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from buffer.config import RAY_PORT, BufferConfig

FREE_PORT_ATTEMPTS = 5
LONGEST_SOCKET_PATH = 100  # the kernel's limit is 107 bytes, 103 on macOS


class CannotListen(OSError):
    """The managed redis-server cannot listen where the configuration says."""


def ports(config: BufferConfig, *, last: int) -> Iterator[int]:
    """Ports to try in turn: the configured one; else the last one, on which clients may wait.

    Raises CannotListen where another program listens on the one that is configured.
    """
    if config.transport == "unix":
        yield 0
        return
    if wanted := config.port or last:
        try:
            yield open_port(config.address, wanted)
        except OSError:
            if config.port:
                raise CannotListen(
                    f"port {config.port} of {config.address} is in use by another program."
                    " Set buffer.port to a free one, or to 0 to have one chosen"
                ) from None
    if not config.port:
        for _ in range(FREE_PORT_ATTEMPTS):
            yield free_port(config.address)


def open_port(bind: str, port: int = 0) -> int:
    """`port`, or one that nobody listens on; OSError unless one can listen there now.

    As with Redis, connections just closed do not count.
    """
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, port), family=family) as probe:
        return int(probe.getsockname()[1])


def free_port(bind: str) -> int:
    """A port nobody listens on, and not Ray's."""
    try:
        while (port := open_port(bind)) == RAY_PORT:
            continue
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {bind}: {error}."
            " Set buffer.bind to a numeric address of this machine"
        ) from error
    return port


def listening_url(folder: Path, config: BufferConfig, port: int) -> str:
    """Address without password."""
    if config.transport == "tcp":
        host = f"[{config.address}]" if ":" in config.address else config.address
        return f"redis://{host}:{port}/0"
    path = folder / "redis.sock"
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise CannotListen(
            f"socket path {path} is longer than {LONGEST_SOCKET_PATH} bytes;"
            " set buffer.transport to tcp, or use a shorter folder"
        )
    return f"unix://{quote(str(path))}"


def configuration(folder: Path, config: BufferConfig, *, port: int, password: str) -> str:
    """Text of redis.conf."""
    lines = [
        f"dir {quoted(str(folder))}",
        "logfile redis.log",
        f"requirepass {quoted(password)}",
        f"port {port}",
        "appendonly yes",
        # An acknowledged write is on disk. `everysec` was seen to lose up to 2 s on kill -9.
        "appendfsync always",
        "no-appendfsync-on-rewrite no",
        'save ""',
        # Eviction is the buffer's to decide; Redis would drop whole hashes.
        "maxmemory-policy noeviction",
    ]
    if config.transport == "unix":
        lines += ["unixsocket redis.sock", "unixsocketperm 700"]
    else:
        lines.append(f"bind {config.address}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A value for redis.conf, every unusual byte as an escape."""
    escaped = re.sub(rb"[^\w/.-]", lambda byte: b"\\x%02x" % ord(byte[0]), os.fsencode(text))
    return f'"{escaped.decode()}"'
