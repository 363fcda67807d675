"""Filters, order and page of the table, as an address spells them. Knows nothing of HTTP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.inspector.rows import Entry, Row
from tasks.records import mistake

PAGE_SIZE = 50

Sort = Literal["created", "reward", "version", "length", "draws", "again", "replaced", "prompt"]
SORT_KEYS: Mapping[Sort, Callable[[Entry], Any]] = {
    "created": lambda entry: entry.created_s,
    "reward": lambda entry: entry.log_reward,
    "version": lambda entry: entry.version,
    "length": lambda entry: entry.num_tokens,
    "draws": lambda entry: entry.tally.draws,
    "again": lambda entry: entry.tally.duplicates,
    "replaced": lambda entry: entry.tally.near_replaced,
    "prompt": lambda entry: entry.prompt,
}
_VERDICTS = {"yes": True, "no": False, "unknown": None}
_Text = Annotated[str | None, Field(max_length=500)]


class BadQuery(ValueError):
    """Filters hold what they cannot; the text names each of them."""


class Query(BaseModel):
    """Filters that are None let everything through; those given must all hold."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    task: _Text = None
    prompt: _Text = None  # its key, or a part of its text
    search: _Text = None  # part of prompt, rationale or answer; or how an id begins
    reward_min: float | None = None  # nats
    reward_max: float | None = None
    correct: Literal["yes", "no", "unknown"] | None = None
    version_min: int | None = None
    version_max: int | None = None
    age_max: int | None = None  # versions
    tool: Literal["yes", "no"] | None = None
    sort: Sort = "created"
    order: Literal["asc", "desc"] = "desc"
    page: int = Field(1, ge=1)

    @property
    def is_filtering(self) -> bool:
        return bool(self.model_dump(exclude={"sort", "order", "page"}, exclude_none=True))

    def address(self, **changes: Any) -> str:
        """This query, changed, as the query part of an address; '' for the default one."""
        filled = Query(**(self.model_dump() | changes)).model_dump(exclude_defaults=True)
        return f"?{urlencode(filled)}" if filled else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Part of an answer."""

    entries: Sequence[Entry]
    rows: Sequence[Row] = ()  # the same, decoded
    matching: int  # entries that pass the filters, all pages together
    number: int  # from 1
    pages: int  # at least 1
    unsearched: int  # entries that a search has not come to yet

    @classmethod
    def cut(cls, entries: Sequence[Entry], number: int, *, unsearched: int = 0) -> "Page":
        """Page `number` of the entries; beyond the last it is the last."""
        pages = max(1, -(-len(entries) // PAGE_SIZE))
        number = min(number, pages)
        start = (number - 1) * PAGE_SIZE
        shown, matching = entries[start : start + PAGE_SIZE], len(entries)
        return cls(
            entries=shown, matching=matching, number=number, pages=pages, unsearched=unsearched
        )


def parse_query(parameters: Mapping[str, str]) -> Query:
    """Read the query part of an address, without a form's empty fields; raises BadQuery."""
    given = {name: text.strip() for name, text in parameters.items() if text.strip()}
    try:
        return Query.model_validate(given)
    except ValidationError as error:
        found = (f"{detail['loc'][0]}: {mistake(detail)}" for detail in error.errors())
        raise BadQuery("; ".join(found)) from error


def select(entries: Sequence[Entry], query: Query, *, version: int) -> list[Entry]:
    """Filter and sort, but for the search; `version` is the learner's, from which ages count.

    Ties go by id, so that pages never overlap.
    """
    found = [entry for entry in entries if matches(entry, query, version=version)]
    found.sort(key=lambda entry: entry.id)
    found.sort(key=SORT_KEYS[query.sort], reverse=query.order == "desc")
    return found


def matches(entry: Entry, query: Query, *, version: int) -> bool:
    """Whether an entry passes every filter but the search."""
    of_prompt = (query.prompt or "").casefold() in entry.prompt.casefold()
    return (
        query.task in (None, entry.task)
        and (of_prompt or query.prompt == entry.prompt_key)
        and _within(entry.log_reward, query.reward_min, query.reward_max)
        and (query.correct is None or entry.correct is _VERDICTS[query.correct])
        and _within(entry.version, query.version_min, query.version_max)
        and _within(entry.age(version), None, query.age_max)
        and (query.tool is None or entry.used_tool == (query.tool == "yes"))
    )


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)
