"""Held-out data of a task: what it is measured on, and never trained on, in two splits.

Choices (objective, learning rate, ...) are made on the validation split, and final figures are
those of the test split.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, overload

from pydantic import Field

from lm.config import Frozen
from tasks.records import FILES, DataError

Split = Literal["validation", "test"]
Record = TypeVar("Record")
Item = TypeVar("Item")
_SHOWN = 3  # records that an error quotes


class HeldOutConfig(Frozen):
    """Keys of a task that is measured on files."""

    tests: tuple[str, ...] = Field((), json_schema_extra=FILES)
    """Files to evaluate on; none: by the distance to the posterior."""
    validation: tuple[str, ...] = Field((), json_schema_extra=FILES)
    """Files to make choices on, in the form of those."""
    validation_share: float = Field(0.0, ge=0, le=0.5)
    """Where there are none: share of the training data, chosen by a hash of its text, that is
    validated on and not trained on."""


class NothingToMeasure(ValueError):
    """A validation split that is empty, of a task that is measured on held-out data."""


class Items(Sequence[Item], Generic[Record, Item]):
    """Items to measure on, each made when it is first asked for: most processes measure nothing."""

    def __init__(self, records: Sequence[Record], make: Callable[[Record], Item]) -> None:
        self._records = records
        self._make = make
        self._made: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        places = range(len(self._records))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        if places not in self._made:
            self._made[places] = self._make(self._records[places])
        return self._made[places]


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits(Generic[Record]):
    """What a task trains on, and what it is measured on."""

    training: tuple[Record, ...]
    held_out: Mapping[Split, Sequence[Sequence[Record]]]

    def made(self, make: Callable[[Record], Item]) -> dict[Split, Sequence[Sequence[Item]]]:
        """What is held out, each record as an item to measure on."""
        return {
            split: tuple(Items(file, make) for file in files)
            for split, files in self.held_out.items()
        }


def read_splits(
    config: HeldOutConfig,
    training: Sequence[Record],
    load: Callable[[str], tuple[Record, ...]],
    text: Callable[[Record], str],
) -> Splits[Record]:
    """The files of both splits, and `training` without what is carved out of it.

    Records of equal `text` are the same. Raises DataError for a file that `load` refuses, and for
    records that are in both splits.
    """
    tests, validation = (tuple(map(load, paths)) for paths in (config.tests, config.validation))
    share = 0.0 if validation else config.validation_share
    carved = tuple(record for record in training if _place(text(record)) < share)
    kept = tuple(record for record in training if _place(text(record)) >= share)
    if carved:
        validation = (carved,)
    check_apart("task.validation", validation, "task.tests", tests, text)
    return Splits(training=kept, held_out={"validation": validation, "test": tests})


def check_split(task: str, held_out: Mapping[Split, Sequence[object]], split: Split) -> None:
    """Raise NothingToMeasure for the validation split where only test data are held out.

    Where no test data are, a policy is measured by its distance to the posterior.
    """
    if split == "validation" and held_out.get("test") and not held_out.get(split):
        raise NothingToMeasure(
            f"task {task!r}: nothing is held out to make choices on, and test data are not for "
            "that: name files as task.validation, or hold a tenth of the training data out by "
            "task.validation_share=0.1"
        )


def check_apart(
    one: str,
    ones: Sequence[Sequence[Record]],
    other: str,
    others: Sequence[Sequence[Record]],
    text: Callable[[Record], str],
) -> None:
    """Raise DataError for records that both of two keys of the configuration bring."""
    first, second = (
        {text(record) for file in files for record in file} for files in (ones, others)
    )
    if shared := sorted(first & second):
        raise DataError(
            f"{len(shared)} records of {one} are among those of {other} too, and what is found on "
            f"the one would be no news of the other; take them out of one: {shared[:_SHOWN]}"
        )


def _place(text: str) -> float:
    """In [0, 1), the same for the same text on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
