"""`metrics.jsonl`: one JSON object a line, appended and never rewritten."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


class MetricsLog:
    """Appends rows of metrics; each is on its way to the disk when `write` returns.

    A crash can leave half a line at the end. Opening the log again ends that line, so that no row
    is ever glued to it.
    """

    def __init__(self, path: Path) -> None:
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows, in order; a torn line is passed over. No file: no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
