"""Prompts to continue in text files: UTF-8, one prompt of one to three sentences in each line.

With their next sentences, to be imitated, they come in JSON Lines:

    {"prompt": "It rained at noon.", "next": "The captain was tired."}
"""

from pydantic import BaseModel, ConfigDict

from tasks.records import read_records, read_text, refuse

LONGEST = 2000  # characters of a prompt


def load_prompts(path: str) -> tuple[str, ...]:
    """All prompts of a file, blanks at their ends taken off; raises DataError with the bad lines.

    A line is bad when it is empty, longer than LONGEST characters, or holds a control character.
    """
    prompts, wrong = [], []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        prompt = line.strip()
        if fault := _fault(prompt):
            wrong.append(f"{path}:{number}: {fault}")
        prompts.append(prompt)
    refuse(wrong)
    return tuple(prompts)


class _Record(BaseModel):
    """The schema of a prompt with its next sentence."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    next: str


PROMPT, NEXT = _Record.model_fields


def load_continued(path: str) -> tuple[tuple[str, str], ...]:
    """All prompts of a file with their next sentences; raises DataError with the bad lines: either
    text is missing, or what `load_prompts` would refuse. Other keys are ignored."""
    return read_records(path, _Record, _pair)


def _pair(record: _Record) -> tuple[str, str]:
    texts = record.prompt.strip(), record.next.strip()
    for key, text in zip((PROMPT, NEXT), texts, strict=True):
        if fault := _fault(text):
            raise ValueError(f"key {key!r}: {fault}")
    return texts


def _fault(prompt: str) -> str:
    if not prompt:
        return "empty; write a prompt of one to three sentences in every line"
    if len(prompt) > LONGEST:
        return f"{len(prompt)} characters; a prompt has {LONGEST} at most"
    bad = [character for character in prompt if ord(character) < 32]
    return f"holds the control character {bad[0]!r}; take it out" if bad else ""
