"""Stories with a middle, and files of them (tasks.records), such as JSON Lines or CSV.

    {"sentence1": "Nora wanted ...", ..., "sentence5": "She ..."}
    {"beginning": "Like the bombs, ...", "middle": "Between ...", "ending": "Over the ..."}

The keys, or columns, are `sentence1` to `sentence5`, of which the fourth is the middle, or
`beginning`, `middle` and `ending`; others, such as an id or a title, are ignored.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from tasks.records import read_records


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


class _Record(BaseModel):
    """The schema of either form."""

    model_config = ConfigDict(extra="ignore")


class _FiveSentences(_Record):
    sentence1: str
    sentence2: str
    sentence3: str
    sentence4: str
    sentence5: str


class _Passage(_Record):
    beginning: str
    middle: str
    ending: str


KEYS = tuple(_FiveSentences.model_fields)


def load_stories(path: str) -> tuple[Story, ...]:
    """All stories of a file; raises DataError, which lists the bad lines with what is wrong."""
    return read_records(path, (_FiveSentences, _Passage), _story)


def _story(record: _Record) -> Story:
    texts = {key: text.strip() for key, text in record.model_dump().items()}
    if empty := [key for key, text in texts.items() if not text]:
        raise ValueError(f"no text under {', '.join(empty)}; a story has {' and '.join(texts)}")
    if broken := [key for key, text in texts.items() if "\n" in text]:
        raise ValueError(f"a line break under {', '.join(broken)}; is a quote left open?")
    return Story(tuple(texts.values()))
