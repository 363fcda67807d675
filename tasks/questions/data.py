"""Rows of questions: in files (tasks.records), in Parquet, or in a dataset of Hugging Face's hub.

    {"question": "What is 3 + 4?", "answer": 7, "rationale": "3 + 4 = 7"}

The libraries that read Parquet and datasets are imported where they are asked for: neither is
needed for anything else (`pip install -e .[datasets]`).
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any, TypeVar

from tasks.config import QuestionsConfig
from tasks.records import DataError, UnnamedColumn, dataset_name, made_of, read_values

Record = TypeVar("Record")
_LOOKED_AT = 1000  # rows of a file, before anything is loaded


@dataclass(frozen=True, slots=True)
class Question:
    """One row."""

    columns: Mapping[str, str]  # by name, those of `task.question` and so on by these keys too
    answer: str
    rationale: str | None
    record: str  # the whole row, as a JSON object, with question and answer under these keys


def read_questions(
    config: QuestionsConfig, source: str, make: Callable[[Question], Record]
) -> tuple[Record, ...]:
    """What each row of a file or dataset becomes.

    Args:
        make: a ValueError says what is wrong with a row.

    Raises DataError, which lists the bad rows with their places.
    """
    rows = islice(_rows(config, source), config.max_questions)
    return made_of(source, rows, lambda row: make(_question(config, row)))


def check_rows(config: QuestionsConfig) -> None:
    """Raise DataError for the first rows of files that lack what the columns or templates name.

    Needs no tokenizer, so that it can be told before anything is loaded.
    """
    first = config.model_copy(update={"max_questions": _LOOKED_AT})
    for source in (config.data, *config.tests, *config.validation):
        if dataset_name(source) is None and not source.lower().endswith(".parquet"):
            read_questions(first, source, lambda row: texts_of(config, row))


def texts_of(config: QuestionsConfig, row: Question) -> tuple[str, str]:
    """X and Y of a row; raises ValueError where it lacks a column."""
    filled = []
    for key, template in (("x", config.x), ("y", config.y)):
        try:
            filled.append(template.format_map(row.columns))
        except KeyError as error:
            raise UnnamedColumn(
                f"task.{key} names the column {error}, in which it has no text; it has "
                f"{', '.join(row.columns)}"
            ) from None
    return filled[0], filled[1]


def _question(config: QuestionsConfig, row: Any) -> Question:
    """Raises ValueError for a row in which something is missing or no text."""
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.40} is no row: write an object with columns by name")
    columns = {name: text for name, value in row.items() if (text := _text(value)) is not None}
    for key in ("question", "answer"):
        name = getattr(config, key)
        if name not in row:
            has = ", ".join(row)
            raise UnnamedColumn(f"has no column {name!r}; it has {has}: name yours in task.{key}")
        if not columns.get(name, "").strip():
            raise ValueError(f"column {name!r} is {row[name]!r:.40}: give it a text or a number")
        columns[key] = columns[name]
    rationale = row.get(config.rationale)
    if rationale is not None and not isinstance(rationale, str):
        raise ValueError(
            f"column {config.rationale!r} is {rationale!r:.40}: give it a text, or leave it out"
        )
    if rationale is not None and not rationale.strip():  # a CSV row has every column
        rationale = None
    keys = {key: columns[key] for key in ("question", "answer")}
    record = json.dumps(row | keys, default=str, ensure_ascii=False)
    return Question(columns, columns["answer"], rationale, record)


def _text(value: Any) -> str | None:
    """A text or number as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _rows(config: QuestionsConfig, source: str) -> Iterator[tuple[str, Any]]:
    """Place and content of each; raises DataError."""
    if dataset := dataset_name(source):
        yield from _dataset_rows(config, source, dataset[1], dataset[2] or "train")
    elif source.lower().endswith(".parquet"):
        yield from _parquet_rows(source)
    else:
        yield from read_values(source)


def _dataset_rows(
    config: QuestionsConfig, source: str, name: str, split: str
) -> Iterator[tuple[str, Any]]:
    if config.revision is None:
        raise DataError(
            f"{source}: set task.revision to the commit of this dataset (its page on the hub, "
            "Files, History), so that a run trains on the same data tomorrow; if a file is meant, "
            "it is not there"
        )
    library = _library("datasets", source)
    try:
        rows = library.load_dataset(
            name, config.subset, split=split, revision=config.revision, streaming=True
        )
        for number, row in enumerate(rows, start=1):
            yield f"{source}: row {number} of {split}", row
    except (GeneratorExit, DataError):
        raise
    except Exception as error:  # whatever a hub, a network or a file format comes up with
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source}: cannot read split {split!r}: {said:.300}; check name, task.subset, "
            "task.revision and the network"
        ) from error


def _parquet_rows(path: str) -> Iterator[tuple[str, Any]]:
    library = _library("pyarrow.parquet", path)
    number = 0
    try:
        for batch in library.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except OSError as error:  # what is no Parquet, too
        raise DataError(f"{path}: cannot read it ({error}); check path and format") from error
    except ValueError as error:
        raise DataError(f"{path}: not Parquet: {error}; write it anew") from error


def _library(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{source}: reading it needs the library {name.partition('.')[0]}: "
            "pip install -e '.[datasets]', or convert the data to JSON Lines"
        ) from error
