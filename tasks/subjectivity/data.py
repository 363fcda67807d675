"""Labelled movie reviews, the words that ask for a label, and JSON Lines files in the form of SUBJ:

    {"text": "the adventures of pluto nash is a whole lot of nada .", "label": 1,
     "label_text": "subjective"}

`label` is 0 for objective and 1 for subjective; `label_text` may be missing. Empty lines count for
nothing.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.data_error import DataError, read_text

Label = Literal["objective", "subjective"]
LABELS: tuple[Label, ...] = ("objective", "subjective")
_SHOWN = 10  # bad lines that one error names


def question(text: str) -> str:
    """X: the request that a reader answers."""
    return f'Classify this movie review as objective or subjective: "{text}" This review is'


def answer_text(label: str) -> str:
    """Y behind a reason."""
    return f", so it is {label}."


def bare_answer_text(label: str) -> str:
    """Y without a reason."""
    return f" {label}."


@dataclass(frozen=True, slots=True)
class LabelledReview:
    """One sentence of a review and its true label."""

    text: str
    label: Label


class _Record(BaseModel):
    """The file's schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    label: Literal[0, 1]
    label_text: str | None = None


def load_reviews(path: str) -> tuple[LabelledReview, ...]:
    """All reviews of a file; raises DataError, which names every bad line up to ten."""
    reviews, faults = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                reviews.append(_review(line))
            except ValueError as error:
                faults.append(f"line {number}: {error}")
    if faults:
        more = len(faults) - _SHOWN
        listed = "; ".join(faults[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise DataError(f"{path}: {listed}")
    if not reviews:
        raise DataError(f"{path}: holds no review; it needs one JSON object a line")
    return tuple(reviews)


def _review(line: str) -> LabelledReview:
    """Raises ValueError, saying what is wrong and how it should be."""
    try:
        record = _Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = f"key {first['loc'][0]!r}: " if first["loc"] else ""
        raise ValueError(
            f"{key}{first['msg']}; it must have text and label (0 objective, 1 subjective), and "
            "may have label_text"
        ) from error
    text, label = record.text.strip(), LABELS[record.label]
    if not text:
        raise ValueError("key 'text' is empty; write the review, or remove the line")
    if record.label_text not in (None, label):
        raise ValueError(
            f"key 'label_text' is {record.label_text!r}, but label {record.label} is {label!r}; "
            "correct one of them"
        )
    return LabelledReview(text, label)
