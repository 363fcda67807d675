"""Whether all processes of a run run the same source, on every node and to its end."""

import functools
import hashlib
from pathlib import Path

from cluster.config.project import PACKAGES, PROJECT_ROOT

_SUFFIXES = (".py", ".lua", ".toml")
_DIGITS = 12


class SourceMixture(RuntimeError):
    """A process runs other source than the driver of its run."""


@functools.cache
def source_fingerprint(root: Path = PROJECT_ROOT) -> str:
    """Hexadecimal digits that change with any code, script or configuration file of the project.

    Each process looks once: what it imported does not change with the files.
    """
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*")):
        if path.suffix in _SUFFIXES and path.is_file():
            content = path.read_bytes()
            # Lengths keep the end of one file from passing for the beginning of the next.
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:_DIGITS]


def check_source(expected: str, *, node: str, root: Path = PROJECT_ROOT) -> None:
    """Raise SourceMixture unless this process, on `node`, has the driver's fingerprint."""
    found = source_fingerprint(root)
    if found != expected:
        raise SourceMixture(
            f"node {node} has source {found} in {root}, the driver of the run has {expected}: "
            f"submit with 'ray job submit --working-dir', which brings the driver's code to every "
            f"node, or bring all checkouts to the same state and leave them while the run goes on"
        )
