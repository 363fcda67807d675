"""Five-sentence stories in files: JSON Lines, or CSV with a header, told apart by the file's name.

    {"sentence1": "Nora wanted ...", ..., "sentence5": "She ..."}

The keys, or columns, are `sentence1` to `sentence5`; others, such as an id or a title, are ignored.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.arithmetic_data import DataError
from tasks.seed.stories import Story

KEYS = tuple(f"sentence{number}" for number in range(1, 6))
_TOLD = 20  # bad lines that an error lists


def load_stories(path: str) -> tuple[Story, ...]:
    """All stories of a file; raises DataError, which lists the bad lines with what is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: not text in UTF-8: {error}; convert it") from error
    rows = _csv_rows(text) if path.lower().endswith(".csv") else _json_rows(text)
    stories, wrong = [], []
    for line, row in rows:
        fault = row if isinstance(row, str) else _fault(row)
        if fault:
            wrong.append(f"{path}:{line}: {fault}")
        elif not isinstance(row, str):
            one, two, three, four, five = (row[key].strip() for key in KEYS)
            stories.append(Story((one, two, three, four, five)))
    if wrong:
        more = [f"... and {len(wrong) - _TOLD} more"] if len(wrong) > _TOLD else []
        raise DataError("\n".join([*wrong[:_TOLD], *more]))
    if not stories:
        raise DataError(f"{path}: holds no story")
    return tuple(stories)


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and object, or what is wrong with the line."""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, row if isinstance(row, dict) else "must be an object with keys of sentences"


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, row


def _fault(row: dict[str, Any]) -> str:
    bad = [key for key in KEYS if not isinstance(row.get(key), str) or not row[key].strip()]
    return f"no text under {', '.join(bad)}; a story has {KEYS[0]} to {KEYS[-1]}" if bad else ""
