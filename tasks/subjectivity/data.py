"""Labelled movie reviews, the words that ask for a label, and files (tasks.records) as of SUBJ:

    {"text": "the adventures of pluto nash is a whole lot of nada .", "label": 1,
     "label_text": "subjective"}

`label` is 0 for objective and 1 for subjective; `label_text` may be missing.
"""

from dataclasses import dataclass
from typing import Literal

from lm.config import Frozen
from tasks.records import read_records

Label = Literal["objective", "subjective"]
LABELS: tuple[Label, ...] = ("objective", "subjective")


def question(text: str) -> str:
    """X: the request that a reader answers."""
    return f'Classify this movie review as objective or subjective: "{text}" This review is'


def telling(text: str, label: str) -> str:
    """The request with the label given away, which a reason follows."""
    return f'"{text}" This movie review is {label}, because it is'


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


class _Record(Frozen):
    text: str
    label: Literal[0, 1]
    label_text: str | None = None


def load_reviews(path: str) -> tuple[LabelledReview, ...]:
    """All reviews of a file; raises DataError, which lists the bad lines with what is wrong."""
    return read_records(path, _Record, _review)


def _review(record: _Record) -> LabelledReview:
    """Raises ValueError, saying what is wrong and how it should be."""
    text, label = record.text.strip(), LABELS[record.label]
    if not text:
        raise ValueError("key 'text' is empty; write the review, or remove the line")
    if record.label_text not in (None, label):
        raise ValueError(
            f"key 'label_text' is {record.label_text!r}, but label {record.label} is {label!r}; "
            "correct one of them"
        )
    return LabelledReview(text, label)
