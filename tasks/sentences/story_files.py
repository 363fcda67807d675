"""Five-sentence stories in files: JSON Lines, or CSV with a header, told apart by the file's name.

    {"sentence1": "Nora wanted ...", ..., "sentence5": "She ..."}

The keys, or columns, are `sentence1` to `sentence5`; others, such as an id or a title, are ignored.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.data_error import DataError, read_text, refuse

NUM_BEGINNING = 3  # sentences in front of the middle
KEYS = tuple(f"sentence{number}" for number in range(1, 6))


@dataclass(frozen=True, slots=True)
class Story:
    """Five sentences, each with its full stop."""

    sentences: tuple[str, str, str, str, str]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def beginning(self) -> str:
        return " ".join(self.sentences[:NUM_BEGINNING])

    @property
    def middle(self) -> str:
        return self.sentences[NUM_BEGINNING]

    @property
    def ending(self) -> str:
        return self.sentences[-1]


def load_stories(path: str) -> tuple[Story, ...]:
    """All stories of a file; raises DataError, which lists the bad lines with what is wrong."""
    text = read_text(path)
    rows = _csv_rows(path, text) if path.lower().endswith(".csv") else _json_rows(text)
    stories, wrong = [], []
    for line, row in rows:
        fault = row if isinstance(row, str) else _fault(row)
        if fault:
            wrong.append(f"{path}:{line}: {fault}")
        elif not isinstance(row, str):
            one, two, three, four, five = (row[key].strip() for key in KEYS)
            stories.append(Story((one, two, three, four, five)))
    refuse(wrong)
    if not stories:
        raise DataError(f"{path}: holds no story")
    return tuple(stories)


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and object, or what is wrong with the line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, row if isinstance(row, dict) else "must be an object with keys of sentences"


def _csv_rows(path: str, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and columns by name; raises DataError where quotes leave no telling of rows."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
    read = 1  # lines, of which the first is the header
    try:
        for row in reader:
            read = reader.line_num
            yield read, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{read + 1}: not CSV: {error}; a quote that is opened is closed on the "
            "same line, and one within a sentence is doubled"
        ) from error


def _fault(row: dict[str, Any]) -> str:
    bad = [key for key in KEYS if not isinstance(row.get(key), str) or not row[key].strip()]
    if bad:
        return f"no text under {', '.join(bad)}; a story has {KEYS[0]} to {KEYS[-1]}"
    broken = [key for key in KEYS if "\n" in row[key].strip()]
    return f"a line break under {', '.join(broken)}; is a quote left open?" if broken else ""
