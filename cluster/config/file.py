"""Reading a run's configuration: TOML, overrides from the command line, all mistakes at once."""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config.schema import RunConfig
from cluster.config.toml_source import key_lines, line_of

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
_COMMAND_LINE = "command line"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# Sections of several kinds.
_ALTERNATIVES = ("task",)


class ConfigError(ValueError):
    """A configuration that cannot be used; the text lists every mistake with its place."""


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
    overridden = {_override(table, item) for item in overrides}
    lines = key_lines(text)

    def place(key: str) -> str:
        if any(key == name or key.startswith(f"{name}.") for name in overridden):
            return _COMMAND_LINE
        line = line_of(key, lines)
        in_file = path if line is None else f"{path}:{line}"
        if any(name.startswith(f"{key}.") for name in overridden):  # a section with overrides in it
            return f"{in_file} and {_COMMAND_LINE}" if key in lines else _COMMAND_LINE
        return in_file

    return _validated(_located(table), place)


def locate(path: str) -> Path:
    """`path` where it exists: from the working directory, else from the project's root."""
    given = Path(path).expanduser()
    if given.exists() or not (PROJECT_ROOT / given).exists():
        return given
    return PROJECT_ROOT / given


def resolved_toml(config: RunConfig) -> str:
    """`config` with every default filled in, as TOML that `load_config` reads; no passwords."""
    plain = config.model_dump(mode="json", exclude={"buffer": {"password"}})
    return "\n".join(_toml_table(plain, ""))


class Key(NamedTuple):
    """One key of the schema."""

    section: str  # dotted; empty at the top level
    kind: str  # which of the section's alternatives has it: the value of their `name`, else empty
    name: str
    default: str  # as in TOML, or "required"
    description: str

    @property
    def path(self) -> str:
        """As an override names it."""
        return f"{self.section}.{self.name}".lstrip(".")


def keys(model: type[BaseModel] = RunConfig, section: str = "", kind: str = "") -> Iterator[Key]:
    """Every key of the schema; those of alternative sections one alternative after the other."""
    for name, field in model.model_fields.items():
        inner = _models_of(field.annotation)
        for one in inner:
            alternative = _kind_of(one) if inner[1:] else kind
            yield from keys(one, f"{section}.{name}".lstrip("."), alternative)
        if not inner:
            default = "required" if field.is_required() else _toml_value(field.default)
            yield Key(section, kind, name, default, field.description or "")


def _override(table: dict[str, Any], item: str) -> str:
    """Set one `section.key=value` in `table`; its key."""
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{_COMMAND_LINE}: {item!r} is no override; write section.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a string needs no quotes here: shells eat them
    *sections, last = key.split(".")
    for position, section in enumerate(sections):
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            owner = ".".join(sections[: position + 1])
            raise ConfigError(f"{_COMMAND_LINE}: {key}: {owner} is a value and has no keys")
    table[last] = value
    return key


def _located(table: dict[str, Any]) -> dict[str, Any]:
    """`table` with the model's and the task's files as absolute paths, where they exist."""

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        if isinstance(value, dict):
            return {key: absolute(item) for key, item in value.items()}
        if isinstance(value, str) and "/" in value and locate(value).exists():
            return str(locate(value).resolve())
        return value

    return {
        key: absolute(value) if key in ("lm", "task") else value for key, value in table.items()
    }


def _validated(table: dict[str, Any], place: Callable[[str], str]) -> RunConfig:
    try:
        # JSON, because strict mode then takes arrays for tuples but no string for a number.
        return RunConfig.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        found = [_describe(detail, place) for detail in error.errors(include_url=False)]
    raise ConfigError(
        "\n".join([*found, f"{len(found)} mistakes" if len(found) > 1 else ""]).strip()
    )


def _describe(detail: ErrorDetails, place: Callable[[str], str]) -> str:
    parts = [str(part) for part in detail["loc"] if not str(part).startswith("function-")]
    if parts and parts[0] in _ALTERNATIVES:  # pydantic names the alternatives that it tried
        parts[1:] = parts[3:] if parts[1:2] == ["shipped"] else parts[2:]
    key = ".".join(parts)
    where = f"{place(key)}: {key}"
    value = "" if isinstance(detail["input"], dict) else f" = {_toml_value(detail['input'])}"
    if detail["type"] == "extra_forbidden":
        return f"{where}{value}: unknown key{_suggestion(key)}"
    if detail["type"] == "union_tag_invalid":
        return f"{where}: {detail['msg']}; one of your own is 'module:Class' (docs/own_task.md)"
    if detail["type"] == "missing":
        return f"{where}: missing; the configuration must set it"
    return f"{where}{value}: {detail['msg'].removeprefix('Value error, ')}"


def _suggestion(key: str) -> str:
    known = [key.path for key in keys()] + list(RunConfig.model_fields)
    section, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    near = [name for name in known if name.rpartition(".")[2] == last]
    near += difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
    near += difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {near[0]}?"
    names = ", ".join(name.rpartition(".")[2] for name in siblings)
    return f"; [{section}] has {names}" if names else ""


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The section that a field is, or the alternatives for it; none for a plain value."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in get_args(annotation) for model in _models_of(inner)]


def _kind_of(alternative: type[BaseModel]) -> str:
    """The `name` that chooses it."""
    names = get_args(alternative.model_fields["name"].annotation)
    return names[0] if names else "module:Class"


def _toml_table(table: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield f"\n[{prefix}{_toml_key(key)}]"
            yield from _toml_table(value, f"{prefix}{_toml_key(key)}.")


def _toml_key(key: str) -> str:
    """A key with a dot in it, as a method's name may have, is one key still."""
    return key if _BARE_KEY.fullmatch(key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # JSON's strings, numbers and booleans are TOML's too, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
