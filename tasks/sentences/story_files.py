"""Five-sentence stories, and files of them (tasks.records), such as JSON Lines or CSV.

    {"sentence1": "Nora wanted ...", ..., "sentence5": "She ..."}

The keys, or columns, are `sentence1` to `sentence5`; others, such as an id or a title, are ignored.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from tasks.records import read_records

NUM_BEGINNING = 3  # sentences in front of the middle


@dataclass(frozen=True, slots=True)
class Story:
    """Five sentences, each with its full stop."""

    sentences: tuple[str, str, str, str, str]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def beginning(self) -> str:
        return " ".join(self.sentences[:NUM_BEGINNING])

    @property
    def middle(self) -> str:
        return self.sentences[NUM_BEGINNING]

    @property
    def ending(self) -> str:
        return self.sentences[-1]


class _Record(BaseModel):
    """The file's schema."""

    model_config = ConfigDict(extra="ignore")

    sentence1: str
    sentence2: str
    sentence3: str
    sentence4: str
    sentence5: str


KEYS = tuple(_Record.model_fields)


def load_stories(path: str) -> tuple[Story, ...]:
    """All stories of a file; raises DataError, which lists the bad lines with what is wrong."""
    return read_records(path, _Record, _story)


def _story(record: _Record) -> Story:
    texts = {key: text.strip() for key, text in record.model_dump().items()}
    if empty := [key for key, text in texts.items() if not text]:
        raise ValueError(f"no text under {', '.join(empty)}; a story has {KEYS[0]} to {KEYS[-1]}")
    if broken := [key for key, text in texts.items() if "\n" in text]:
        raise ValueError(f"a line break under {', '.join(broken)}; is a quote left open?")
    one, two, three, four, five = texts.values()
    return Story((one, two, three, four, five))
