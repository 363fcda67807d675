"""Settings of a task that is not shipped: `[task] name = "module:Class"`. Imports no torch.

The class is a `tasks.custom.CustomTask`. Its module is looked for in the working directory last, so
that a file there hides no installed module.
"""

import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

from pydantic import Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from actors.reward_query import RewardKind
from reward.checks import FUNCTION
from tasks.held_out import HeldOutConfig
from tasks.records import mistake


class CustomTaskConfig(HeldOutConfig):
    """The keys of every such task; its class adds its own."""

    reward_kind: ClassVar[RewardKind] = "suffix"

    name: str = Field(description="Module and class of the task (docs/own_task.md).")


class _NoSuchTask(ValueError):
    """A name that leads to no task; the text says why."""


def names_own_task(name: object) -> bool:
    """Whether a task's name is that of a class, and not of a shipped task."""
    return isinstance(name, str) and ":" in name


def resolve_own_task(value: Any, _: Callable[[Any], CustomTaskConfig]) -> CustomTaskConfig:
    """The `[task]` table as an object of the class that it names.

    Raises ValidationError, which has the place of every mistake in the table.
    """
    if isinstance(value, CustomTaskConfig):
        return value
    try:
        section = _find_class(value["name"])
    except _NoSuchTask as error:
        raise _refused(("own_task", str(error), ("name",), value["name"])) from error
    try:
        # JSON, because strict mode then takes arrays for tuples but no string for a number.
        return section.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
    known = f"unknown key; {value['name']} has {', '.join(section.model_fields)}"
    kinds = {"extra_forbidden": ("own_key", known)}
    raise _refused(
        *(
            (*kinds.get(one["type"], (one["type"], mistake(one))), one["loc"], one["input"])
            for one in found
        )
    )


def _find_class(name: str) -> type[CustomTaskConfig]:
    """Raises _NoSuchTask."""
    match = FUNCTION.fullmatch(name)
    if match is None:
        raise _NoSuchTask("is no module and class: write it as 'my_module:MyTask'")
    module = _import(match[1])
    place = getattr(module, "__file__", None) or "a folder"
    found = getattr(module, match[2], None)
    if found is None:
        raise _NoSuchTask(f"module {match[1]} ({place}) has no class {match[2]}")
    fits = isinstance(found, type) and issubclass(found, CustomTaskConfig)
    if not fits or inspect.isabstract(found) or not hasattr(found, "build"):
        raise _NoSuchTask(
            f"{match[2]} in {place} is no subclass of tasks.custom.CustomTask with a build()"
        )
    return found


def _import(module: str) -> ModuleType:
    """Raises _NoSuchTask for a module that is not there, and for any error while it is read."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module == missing or module.startswith(f"{missing}."):
            raise _NoSuchTask(
                f"no module {missing}, neither in {here} nor where Python looks: run the command "
                "in its folder, or set PYTHONPATH"
            ) from error
        raise _NoSuchTask(f"{_told(error)}: install what it imports") from error
    except Exception as error:
        raise _NoSuchTask(f"{_told(error)}: correct the module") from error


def _told(error: Exception) -> str:
    """What went wrong in somebody's module, and where."""
    place: Any = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError) and error.filename:
        place = error
    return f"cannot be imported: {place.filename}:{place.lineno}: {type(error).__name__}: {error}"


def _refused(*mistakes: tuple[str, str, tuple[int | str, ...], Any]) -> ValidationError:
    """Of kind, text, place and value each."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError(kind, "{told}", {"told": text}), loc=place, input=value
        )
        for kind, text, place, value in mistakes
    ]
    return ValidationError.from_exception_data("task", details)
