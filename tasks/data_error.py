"""Data files that cannot be used, told with every bad line."""

from collections.abc import Sequence
from pathlib import Path

TOLD = 20  # bad lines that an error lists


class DataError(ValueError):
    """A data file that cannot be used; the text names file, place and remedy."""


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
    if not faults:
        return
    more = [f"... and {len(faults) - TOLD} more"] if len(faults) > TOLD else []
    raise DataError("\n".join([*faults[:TOLD], *more]))
