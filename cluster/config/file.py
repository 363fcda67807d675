"""A run's configuration as text: the TOML file, overrides from the command line, and back."""

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from cluster.config.project import PROJECT_ROOT, locate
from cluster.config.schema import RunConfig
from cluster.config.validation import ConfigError, set_key, validated
from tasks.records import missing_files

_COMMAND_LINE = "command line"
_DOTTED = re.compile(r"(?!buffer\b)[a-z_]+(\.[a-z0-9_]+)+")
# Keys that name a file or folder; so may any of a task.
_PATHS = ("lm.model", "em.policy", "learner.start_from", "buffer.password_file", "task.embedder")
_TABLE = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")


def load_config(path: str, overrides: Sequence[str] = (), *, files: bool = False) -> RunConfig:
    """The configuration in the TOML file at `path`, changed by `section.key=value` overrides.

    `path` and the files that the configuration names are looked for as `locate` says. Raises
    ConfigError: missing file, bad TOML, or any key or value that the schema refuses; with `files`
    data files of the task that are missing too.
    """
    file = locate(path)
    if not os.path.isfile(file):
        raise ConfigError(f"{path}: no such file, neither here nor in {PROJECT_ROOT}")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of too many digits are ValueErrors
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it ({error.strerror})") from error
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
        owner = key
        while owner and owner not in lines:
            owner = owner.rpartition(".")[0]
        in_file = f"{path}:{lines[owner]}" if owner else path
        if any(name.startswith(f"{key}.") for name in overridden):  # a section with overrides in it
            return f"{in_file} and {_COMMAND_LINE}" if key in lines else _COMMAND_LINE
        return in_file

    try:
        located = {key: _absolute(key, value) for key, value in table.items()}
        config = validated(RunConfig, located, place)
        if missing := list(missing_files(config.task) if files else ()):
            nowhere = f"no such file, neither here nor in {PROJECT_ROOT}"
            told = (f'{place(f"task.{key}")}: task.{key} = "{name}"' for key, name in missing)
            raise ConfigError("\n".join(f"{one}: {nowhere}" for one in told))
        return config
    except RecursionError as error:
        raise ConfigError(f"{path}: tables or arrays in one another, too deep to read") from error


def parse_overrides(items: Sequence[str], origin: str = _COMMAND_LINE) -> dict[str, Any]:
    """`section.key=value` items of `origin` as dotted keys and values, files as absolute paths."""
    changes: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            # Whatever looks like no key may be a password.
            shown = repr(item) if _DOTTED.fullmatch(key) else "an argument"
            raise ConfigError(f"{origin}: {shown} is no override; write section.key=value")
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except (ValueError, RecursionError):
            value = text.strip()  # a string needs no quotes here: shells eat them
        changes.pop(key, None)  # the last one wins, also over keys in between
        changes[key] = _absolute(key, value)
    return changes


def resolved_toml(config: RunConfig) -> str:
    """`config` with every default filled in, as TOML that `load_config` reads."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _absolute(key: str, value: Any) -> Any:
    """A value of the dotted `key`: a path that exists as an absolute one, all else as it is.

    Processes on other nodes, and a run that goes on later, have other working directories.
    """
    if isinstance(value, list | tuple):
        return [_absolute(key, item) for item in value]
    if isinstance(value, dict):
        return {inner: _absolute(f"{key}.{inner}", item) for inner, item in value.items()}
    of_task = key.startswith("task.") and key != "task.name"
    if not isinstance(value, str) or not value.strip("./ ") or not (of_task or key in _PATHS):
        return value
    path = locate(value) if "/" in value else Path(value)
    # A word among a task's settings may also be the name of a folder that happens to be here.
    exists = os.path.isfile(path) or (os.path.exists(path) and ("/" in value or key in _PATHS))
    return str(path.resolve()) if exists else value


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


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
