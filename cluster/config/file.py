"""A run's configuration as text: the TOML file, overrides from the command line, and back."""

import re
import tomllib
from collections.abc import Sequence
from typing import Any

import tomli_w

from cluster.config.project import PROJECT_ROOT, locate
from cluster.config.schema import RunConfig
from cluster.config.validation import ConfigError, set_key, validated

_COMMAND_LINE = "command line"
_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the TOML file at `path`, changed by `section.key=value` overrides.

    `path` and the files that the configuration names are looked for in the working directory,
    then in the project.

    Raises:
        ConfigError: missing file, bad TOML, or any key or value that the schema refuses.
    """
    file = locate(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such file, neither here nor in {PROJECT_ROOT}")
    try:
        text = file.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    overridden = parse_overrides(overrides)
    for key, value in overridden.items():
        try:
            set_key(table, key, value)
        except ConfigError as error:
            raise ConfigError(f"{_COMMAND_LINE}: {error}") from error
    lines = key_lines(text)

    def place(key: str) -> str:
        if any(key == name or key.startswith(f"{name}.") for name in overridden):
            return _COMMAND_LINE
        line = line_of(key, lines)
        in_file = path if line is None else f"{path}:{line}"
        if any(name.startswith(f"{key}.") for name in overridden):  # a section with overrides in it
            return f"{in_file} and {_COMMAND_LINE}" if key in lines else _COMMAND_LINE
        return in_file

    return validated(RunConfig, _located(table), place)


def parse_overrides(items: Sequence[str], origin: str = _COMMAND_LINE) -> dict[str, Any]:
    """`section.key=value` items as dotted keys and values, files as absolute paths.

    Args:
        origin: who wrote them, for messages.
    """
    changes: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{origin}: {item!r} is no override; write section.key=value")
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()  # a string needs no quotes here: shells eat them
        changes.pop(key, None)  # the last one wins, also over keys in between
        changes[key] = _absolute(value) if key.partition(".")[0] in _WITH_FILES else value
    return changes


def resolved_toml(config: RunConfig) -> str:
    """`config` with every default filled in, as TOML that `load_config` reads; no passwords."""
    exclude = {"buffer": {"password"}}
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude=exclude))


_WITH_FILES = ("lm", "task")  # sections that name files


def _located(table: dict[str, Any]) -> dict[str, Any]:
    """`table` with the model's and the task's files as absolute paths, where they exist."""
    return {key: _absolute(value) if key in _WITH_FILES else value for key, value in table.items()}


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    if isinstance(value, str) and "/" in value and locate(value).exists():
        return str(locate(value).resolve())
    return value


def key_lines(text: str) -> dict[str, int]:
    """Line number, from 1, of every table header and every key of `text`, by dotted name.

    `tomllib` keeps no positions. Keys inside inline tables and multi-line strings are not looked
    for: their owner's line stands for them.
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
