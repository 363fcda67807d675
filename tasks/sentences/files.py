"""Files of prompts to continue, and of stories with a middle.

Prompts stand in text files: UTF-8, one prompt of one to three sentences in each line. With their
next sentences, to be imitated, they come in JSON Lines:

    {"prompt": "It rained at noon.", "next": "The captain was tired."}

Stories come in files of records (tasks.records), such as JSON Lines or CSV:

    {"sentence1": "Nora wanted ...", ..., "sentence5": "She ..."}
    {"beginning": "Like the bombs, ...", "middle": "Between ...", "ending": "Over the ..."}

Their keys, or columns, are `sentence1` to `sentence5`, of which the fourth is the middle, or
`beginning`, `middle` and `ending`; others, such as an id or a title, are ignored.
"""

from dataclasses import dataclass

from pydantic import BaseModel

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


class _Continued(BaseModel):
    """The schema of a prompt with its next sentence."""

    prompt: str
    next: str


PROMPT, NEXT = _Continued.model_fields


def load_continued(path: str) -> tuple[tuple[str, str], ...]:
    """All prompts of a file with their next sentences; raises DataError with the bad lines: either
    text is missing, or what `load_prompts` would refuse. Other keys are ignored."""
    return read_records(path, _Continued, _pair)


def _pair(record: _Continued) -> tuple[str, str]:
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


@dataclass(frozen=True, slots=True)
class Story:
    """Sentences, or several in one, each with its full stop; the last but one is the middle."""

    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def beginning(self) -> str:
        return " ".join(self.sentences[:-2])

    @property
    def middle(self) -> str:
        return self.sentences[-2]

    @property
    def ending(self) -> str:
        return self.sentences[-1]


class _FiveSentences(BaseModel):
    sentence1: str
    sentence2: str
    sentence3: str
    sentence4: str
    sentence5: str


class _Passage(BaseModel):
    beginning: str
    middle: str
    ending: str


KEYS = tuple(_FiveSentences.model_fields)


def load_stories(path: str) -> tuple[Story, ...]:
    """All stories of a file; raises DataError, which lists the bad lines with what is wrong."""
    return read_records(path, (_FiveSentences, _Passage), _story)


def _story(record: BaseModel) -> Story:
    texts = {key: text.strip() for key, text in record.model_dump().items()}
    if empty := [key for key, text in texts.items() if not text]:
        raise ValueError(f"no text under {', '.join(empty)}; a story has {' and '.join(texts)}")
    if broken := [key for key, text in texts.items() if "\n" in text]:
        raise ValueError(f"a line break under {', '.join(broken)}; is a quote left open?")
    return Story(tuple(texts.values()))
