"""Tables against the schema: which keys there are, and all mistakes at once with their places."""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config.project import UserError
from tasks.records import mistake

Schema = TypeVar("Schema", bound=BaseModel)
Place = Callable[[str], str]  # dotted key -> where it stands, for messages; "" where nowhere
_ALTERNATIVES = ("task",)  # sections of several kinds


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the text lists every mistake with its place."""


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


def keys(model: type[BaseModel], section: str = "", kind: str = "") -> Iterator[Key]:
    """Every key of a schema; those of alternative sections one alternative after the other."""
    for name, field in model.model_fields.items():
        inner = _models_of(field.annotation)
        for choice in inner:
            alternative = _kind_of(choice) if inner[1:] else kind
            yield from keys(choice, f"{section}.{name}".lstrip("."), alternative)
        if not inner:
            default = "required" if field.is_required() else _as_toml(field.default)
            yield Key(section, kind, name, default, field.description or "")


def set_key(table: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` of a table of tables or sections, which are copied on the way.

    Raises ConfigError where a part of the key before the last is no section.
    """
    *sections, last = key.split(".")
    for position, section in enumerate(sections):
        inner = table.get(section, {})
        if not isinstance(inner, BaseModel | Mapping):
            owner = ".".join(sections[: position + 1])
            raise ConfigError(f"{key}: {owner} is a value and has no keys")
        table[section] = table = dict(inner)
    table[last] = value


def validated(
    schema: type[Schema], table: Mapping[str, Any], place: Place = lambda key: ""
) -> Schema:
    """The table as an object of the schema; raises ConfigError, which tells every mistake."""
    for key, value in _leaves(table):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(
                f"{_where(key, place)}: a whole number has at most 64 bits, as in TOML"
            )
    try:
        return schema.model_validate(_tuples(table), strict=True)
    except ValidationError as error:
        found = [_told(detail, schema, place) for detail in error.errors(include_url=False)]
    count = [f"{len(found)} mistakes"] if len(found) > 1 else []
    raise ConfigError("\n".join(found + count))


def _where(key: str, place: Place) -> str:
    return ": ".join(filter(None, [place(key), key]))


def _leaves(table: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a table of tables; each of an array has the array's key."""
    for name, value in table.items():
        key = f"{section}.{name}".lstrip(".")
        if isinstance(value, BaseModel | Mapping):
            yield from _leaves(dict(value), key)
        else:
            yield from ((key, v) for v in (value if isinstance(value, list | tuple) else [value]))


def _tuples(value: Any) -> Any:
    """Arrays as the schema has them, which nobody can change."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(v) for key, v in value.items()} if isinstance(value, dict) else value


def _told(detail: ErrorDetails, schema: type[BaseModel], place: Place) -> str:
    parts = [str(part) for part in detail["loc"] if not str(part).startswith("function-")]
    if parts and parts[0] in _ALTERNATIVES:  # pydantic names the alternatives that it tried
        parts[1:] = parts[3:] if parts[1:2] == ["shipped"] else parts[2:]
    key = ".".join(parts)
    where = _where(key, place)
    if detail["type"] == "extra_forbidden":  # its value may be a password
        return f"{where}: unknown key{_suggestion(key, schema)}"
    if detail["type"] == "union_tag_invalid":
        tag, shipped = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
        return (
            f"{where}: there is no task {tag!r}; shipped are {shipped}; one of your own is "
            "'module:Class' (docs/own_task.md)"
        )
    if detail["type"] == "union_tag_not_found":
        where = f"{where}.name"
    if detail["type"] in ("missing", "union_tag_not_found"):
        return f"{where}: missing; the configuration must set it"
    secret = parts[:1] == ["buffer"] or isinstance(detail["input"], dict | BaseModel)
    value = "" if secret else f" = {_as_toml(detail['input'])}"
    return f"{where}{value}: {mistake(detail)}"


def _suggestion(key: str, schema: type[BaseModel]) -> str:
    known = [key.path for key in keys(schema)] + list(schema.model_fields)
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


def _as_toml(value: Any) -> str:
    """A value in one line, as TOML has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)
