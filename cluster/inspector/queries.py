"""What a person asks of the table: filters, an order and a page. Knows nothing of HTTP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.inspector.rows import Row

PAGE_SIZE = 50
_LONGEST_TEXT = 500

Sort = Literal["created", "reward", "version", "length", "draws", "again", "replaced", "prompt"]
SORT_KEYS: Mapping[Sort, Callable[[Row], Any]] = {
    "created": lambda row: row.created_s,
    "reward": lambda row: row.log_reward,
    "version": lambda row: row.version,
    "length": lambda row: row.num_tokens,
    "draws": lambda row: row.tally.draws,
    "again": lambda row: row.tally.duplicates,
    "replaced": lambda row: row.tally.near_replaced,
    "prompt": lambda row: row.prompt,
}
_VERDICTS: Mapping[str, bool | None] = {"yes": True, "no": False, "unknown": None}


class BadQuery(ValueError):
    """A filter holds something that it cannot hold."""


class Query(BaseModel):
    """Filters that are None let everything through; those given must all hold."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    task: str | None = Field(None, max_length=_LONGEST_TEXT)
    prompt: str | None = Field(
        None, max_length=_LONGEST_TEXT, description="Its key, or a part of its text."
    )
    search: str | None = Field(
        None,
        max_length=_LONGEST_TEXT,
        description="Part of prompt, rationale or answer, in either case; or how an id begins.",
    )
    reward_min: float | None = Field(None, description="nats")
    reward_max: float | None = Field(None, description="nats")
    correct: Literal["yes", "no", "unknown"] | None = None
    version_min: int | None = None
    version_max: int | None = None
    age_max: int | None = Field(None, description="versions")
    tool: Literal["yes", "no"] | None = None
    sort: Sort = "created"
    order: Literal["asc", "desc"] = "desc"
    page: int = Field(1, ge=1)

    @property
    def is_filtering(self) -> bool:
        """Whether any filter is set."""
        return bool(self.model_dump(exclude={"sort", "order", "page"}, exclude_none=True))

    def address(self, **changes: Any) -> str:
        """This query, changed, as the query part of an address; '' for the default one."""
        changed = Query.model_validate(self.model_dump() | changes)
        filled = changed.model_dump(exclude_defaults=True)
        return f"?{urlencode(filled)}" if filled else ""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of an answer."""

    rows: Sequence[Row]
    matching: int  # rows that pass the filters, all pages together
    number: int  # from 1
    pages: int  # at least 1


def parse_query(parameters: Mapping[str, str]) -> Query:
    """Read the query part of an address; an empty field of a form counts as not given.

    Raises BadQuery, naming every field that cannot be read.
    """
    given = {name: text.strip() for name, text in parameters.items()}
    try:
        return Query.model_validate({name: text for name, text in given.items() if text})
    except ValidationError as error:
        raise BadQuery(
            "; ".join(f"{detail['loc'][0]}: {detail['msg']}" for detail in error.errors())
        ) from error


def select(rows: Sequence[Row], query: Query, *, version: int) -> Page:
    """Filter, sort and cut; `version` is the learner's, from which ages count.

    Ties go by id, so that pages never overlap. A page beyond the last is the last.
    """
    found = [row for row in rows if matches(row, query, version=version)]
    key = SORT_KEYS[query.sort]
    found.sort(key=lambda row: row.id)
    found.sort(key=key, reverse=query.order == "desc")
    pages = max(1, -(-len(found) // PAGE_SIZE))
    number = min(query.page, pages)
    start = (number - 1) * PAGE_SIZE
    return Page(found[start : start + PAGE_SIZE], len(found), number, pages)


def matches(row: Row, query: Query, *, version: int) -> bool:
    """Whether a row passes every filter."""
    return (
        query.task in (None, row.task)
        and (query.prompt is None or _is_of_prompt(row, query.prompt))
        and (query.search is None or _mentions(row, query.search.casefold()))
        and _within(row.log_reward, query.reward_min, query.reward_max)
        and (query.correct is None or row.correct is _VERDICTS[query.correct])
        and _within(row.version, query.version_min, query.version_max)
        and _within(row.age(version), None, query.age_max)
        and (query.tool is None or row.used_tool == (query.tool == "yes"))
    )


def _is_of_prompt(row: Row, text: str) -> bool:
    return text == row.prompt_key or text.casefold() in row.prompt.casefold()


def _mentions(row: Row, folded: str) -> bool:
    texts = (row.prompt, row.rationale, row.answer)
    return any(folded in text.casefold() for text in texts) or row.id.startswith(folded)


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)
