"""`metrics.jsonl`: one JSON object a line, appended and never rewritten."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


class MetricsLog:
    """Appends rows of metrics; each is on its way to the disk when `write` returns.

    A crash or a full disk can leave half a line at the end. The next row begins a line of its own,
    so that no row is ever glued to it.
    """

    def __init__(self, path: Path) -> None:
        self._torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; raises OSError where the disk does not take all of it."""
        begin = b"\n" if self._torn else b""
        line = begin + json.dumps(dict(row)).encode() + b"\n"
        self._torn = True
        try:
            whole = self._file.write(line) == len(line)
        except OSError as error:  # which knows no file
            raise OSError(error.errno, error.strerror, self._file.name) from error
        if not whole:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._torn = False

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows, in order; a torn line is passed over. No file: no rows."""
    return list(rows_in(path.read_bytes())) if path.exists() else []


def rows_in(lines: bytes) -> Iterator[dict[str, float]]:
    """The whole rows among the lines, in order."""
    for line in lines.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row
