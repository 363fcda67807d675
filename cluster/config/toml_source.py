"""Where in a TOML file a key stands; `tomllib` itself keeps no positions."""

import re

_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")


def key_lines(text: str) -> dict[str, int]:
    """Line number, from 1, of every table header and every key of `text`, by dotted name.

    Keys inside inline tables and multi-line strings are not looked for: their owner's line stands
    for them.
    """
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _plain(header[1])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault(".".join(filter(None, [table, _plain(key[1])])), number)
    return lines


def line_of(key: str, lines: dict[str, int]) -> int | None:
    """The line of `key`, else of the nearest table around it, else None."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key)


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
