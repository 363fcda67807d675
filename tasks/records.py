"""Records in files, each of them checked: CSV with a header if the name ends in .csv, JSON with one
list if the file begins with a bracket or its name ends in .json, else JSON Lines.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)
Record = TypeVar("Record")
TOLD = 20  # bad lines that an error lists
FILES: dict[str, Any] = {"files": True}  # json_schema_extra of a key of `[task]` that names some
_DATASET = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.\[\]%:+-]+))?")
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_NUMBER, _WHOLE, _TRUTH = "must be a number", "must be a whole number", "must be true or false"
_TEXT, _LIST, _TABLE = "must be a text, in quotes", "must be a list", "must be a table of keys"
# Mistakes as pydantic sorts them -> what is told of them.
_MISTAKES = {
    **{"string_type": _TEXT, "float_type": _NUMBER, "float_parsing": _NUMBER},
    **{"int_type": _WHOLE, "int_parsing": _WHOLE, "int_from_float": _WHOLE},
    **{"bool_type": _TRUTH, "bool_parsing": _TRUTH, "list_type": _LIST, "tuple_type": _LIST},
    **{"dict_type": _TABLE, "model_type": _TABLE, "model_attributes_type": _TABLE},
    **{"greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}"},
    **{"less_than": "must be below {lt}", "less_than_equal": "must be at most {le}"},
    **{"literal_error": "must be {expected}", "finite_number": "must be a finite number"},
    **{"too_short": "must have {min_length} or more", "too_long": "must have {max_length} or less"},
    **{
        "string_too_short": "must not be empty",
        "missing": "is missing",
        "extra_forbidden": "is unknown",
    },
}


class DataError(ValueError):
    """A data file that cannot be used; the text names file, place and remedy."""


def mistake(detail: Mapping[str, Any]) -> str:
    """What is wrong with a value, in plain words, from what pydantic says of it."""
    words, values = _MISTAKES.get(detail["type"]), detail.get("ctx", {})
    if words is None or "told" in values:  # it is ours already
        return str(detail["msg"]).removeprefix("Value error, ")
    return words.format_map(values)


def missing_files(settings: BaseModel) -> Iterator[tuple[str, str]]:
    """Key and name of each data file of a task's settings that is not there.

    Datasets of a hub, of tasks that read them, are not looked for.
    """
    hub = "revision" in type(settings).model_fields
    for key, field in type(settings).model_fields.items():
        named = getattr(settings, key) if field.json_schema_extra == FILES else None
        for path in named if isinstance(named, tuple) else (named,):
            if path is None or (hub and dataset_name(path)):
                continue
            if not os.path.isfile(path):
                yield key, path


def dataset_name(source: str) -> re.Match[str] | None:
    """OWNER/NAME and SPLIT of a dataset of Hugging Face's hub; None for what is meant as a file."""
    is_file = os.path.exists(source) or source.lower().endswith(_FILE_SUFFIXES)
    return None if is_file else _DATASET.fullmatch(source)


def read_records(
    path: str, model: type[Model] | Sequence[type[Model]], make: Callable[[Model], Record]
) -> tuple[Record, ...]:
    """All records of a file, at least one.

    Args:
        model: the form of a record, checked strictly. Of several a record has the first whose keys
            it has all, and that which comes first where it lacks some of each.
        make: what each becomes; a ValueError says what is wrong with it, beyond its form.

    Raises DataError, which lists the bad records.
    """
    forms = [model] if isinstance(model, type) else model

    def checked(value: Any) -> Record:
        keys = set(value) if isinstance(value, dict) else set()
        form = next((each for each in forms if keys.issuperset(each.model_fields)), forms[0])
        try:
            return make(form.model_validate(value, strict=True))
        except ValidationError as error:
            raise ValueError(_fault(error, form)) from None

    return made_of(path, read_values(path), checked)


class UnnamedColumn(ValueError):
    """A row lacks a column that the settings name; where all do, it is told once."""


def made_of(
    source: str, values: Iterable[tuple[str, Any]], make: Callable[[Any], Record]
) -> tuple[Record, ...]:
    """What each value becomes, at least one; each comes with its place in `source`.

    Raises DataError, which lists the values for which `make` raises a ValueError.
    """
    records: list[Record] = []
    faults: list[str] = []
    unnamed = 0
    for place, value in values:
        try:
            if isinstance(value, _Unreadable):
                raise ValueError(value)
            records.append(make(value))
        except ValueError as error:
            faults.append(f"{place}: {error}")
            unnamed += isinstance(error, UnnamedColumn)
    if not records and unnamed == len(faults) > 1:
        refuse([f"{faults[0]} (so in all {len(faults)} rows)"])
    refuse(faults)
    if not records:
        raise DataError(f"{source}: holds no record; give one at least")
    return tuple(records)


def read_text(path: str) -> str:
    """The file as text, without the byte order mark of some editors; raises DataError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: not text in UTF-8: {error}; convert it") from error


def refuse(faults: Sequence[str]) -> None:
    """Raise DataError with the faults, a line each and TOLD at most, if there are any."""
    more = [f"... and {len(faults) - TOLD} more"] if len(faults) > TOLD else []
    if faults:
        raise DataError("\n".join([*faults[:TOLD], *more]))


class _Unreadable(str):
    """Stands for a record that could not be read: why."""


def read_values(path: str) -> Iterator[tuple[str, Any]]:
    """Place and content of each record of a file; raises DataError for one that has none."""
    text = read_text(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(path, text)
    elif suffix == ".json" or text.lstrip().startswith("["):
        for number, value in enumerate(_list(path, text), start=1):
            yield f"{path}: item {number}", value
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return _Unreadable(f"not JSON: {error}")
    except RecursionError:
        return _Unreadable("not JSON of a record: brackets in brackets, too deep to read")


def _list(path: str, text: str) -> list[Any]:
    values = _parsed(text)
    if isinstance(values, _Unreadable):
        raise DataError(f"{path}: {values}; repair or regenerate it")
    if not isinstance(values, list) or not values:
        raise DataError(
            f"{path}: must hold a list of records, at least one; JSON Lines end in .jsonl"
        )
    return values


def _csv_rows(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """Columns by name; raises DataError where quotes leave no telling of rows."""
    reader = csv.reader(io.StringIO(text), strict=True)
    read = 0
    try:
        header = next(reader, [])
        read = reader.line_num
        for row in reader:
            read = reader.line_num
            if row:
                yield f"{path}:{read}", _columns(header, row)
    except csv.Error as error:
        raise DataError(
            f"{path}:{read + 1}: not CSV: {error}; a quote that is opened is closed on the "
            "same line, and one within a text is doubled"
        ) from error


def _columns(header: list[str], row: list[str]) -> dict[str, str] | _Unreadable:
    counts = f"the header names {len(header)} columns, this row has {len(row)}"
    if missing := header[len(row) :]:
        return _Unreadable(f"no text under {', '.join(missing)}: {counts}")
    if len(row) > len(header):
        return _Unreadable(f"{counts}; put a text that holds a comma into quotes")
    return dict(zip(header, row, strict=True))


def _fault(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake, and what a record needs."""
    first = error.errors(include_url=False)[0]
    key = f"key {first['loc'][0]!r}: " if first["loc"] else ""
    fields = model.model_fields.items()
    needed = ", ".join(name for name, field in fields if field.is_required())
    optional = ", ".join(name for name, field in fields if not field.is_required())
    may = f", and may have {optional}" if optional else ""
    return f"{key}{mistake(first)}; it must have {needed}{may}"
