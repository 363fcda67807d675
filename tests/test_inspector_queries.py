"""The table's filters, orders and pages against a plain reading of what they mean."""

from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.browser import Tally
from cluster.inspector.queries import (
    PAGE_SIZE,
    SORT_KEYS,
    BadQuery,
    Page,
    Query,
    matches,
    parse_query,
    select,
)
from cluster.inspector.rows import Entry

VERSION = 9
WORDS = st.sampled_from(["", "Alpha", "beta", "alpha beta", "<b>", "ß"])


@st.composite
def made_entries(draw: st.DrawFn) -> Entry:
    return Entry(
        id=f"{draw(st.integers(0, 2**128 - 1)):032x}",
        task=draw(st.sampled_from(["sums", "toy"])),
        prompt_key=draw(st.sampled_from(["p", "q"])),
        prompt=draw(WORDS),
        num_tokens=draw(st.integers(0, 3)),
        used_tool=draw(st.booleans()),
        log_reward=draw(st.sampled_from([-3.0, -1.5, 0.0])),
        correct=draw(st.sampled_from([True, False, None])),
        version=draw(st.integers(0, VERSION)),
        created_s=draw(st.sampled_from([1.0, 2.0])),
        tally=Tally(draws=draw(st.integers(0, 2)), near_replaced=draw(st.integers(0, 2))),
    )


ENTRIES = st.lists(made_entries(), max_size=40, unique_by=lambda entry: entry.id)
MAYBE = {
    "task": st.sampled_from(["sums", "toy", "other"]),
    "prompt": st.sampled_from(["p", "ALPHA", "beta"]),
    "reward_min": st.sampled_from([-2.0, -1.5]),
    "reward_max": st.sampled_from([-1.5, -1.0]),
    "correct": st.sampled_from(["yes", "no", "unknown"]),
    "version_min": st.integers(0, VERSION),
    "version_max": st.integers(0, VERSION),
    "age_max": st.integers(0, VERSION),
    "tool": st.sampled_from(["yes", "no"]),
}
QUERIES = st.fixed_dictionaries(
    {"sort": st.sampled_from(sorted(SORT_KEYS)), "order": st.sampled_from(["asc", "desc"])},
    optional=MAYBE,
).map(lambda fields: Query(**fields))


def wanted(entry: Entry, query: Query) -> bool:
    """Whether an entry passes, filter by filter as the page explains them."""
    checks: dict[str, Any] = {
        "task": lambda task: entry.task == task,
        "prompt": lambda text: entry.prompt_key == text or text.lower() in entry.prompt.lower(),
        "reward_min": lambda least: least <= entry.log_reward,
        "reward_max": lambda most: entry.log_reward <= most,
        "correct": lambda verdict: (
            {"yes": True, "no": False, "unknown": None}[verdict] is entry.correct
        ),
        "version_min": lambda least: least <= entry.version,
        "version_max": lambda most: entry.version <= most,
        "age_max": lambda most: VERSION - entry.version <= most,
        "tool": lambda used: entry.used_tool == (used == "yes"),
    }
    given = query.model_dump(include=set(checks), exclude_none=True)
    return all(checks[name](value) for name, value in given.items())


@settings(max_examples=300)
@given(entries=ENTRIES, query=QUERIES)
def test_filters_let_through_what_their_words_say(entries: list[Entry], query: Query) -> None:
    expected = {entry.id for entry in entries if wanted(entry, query)}
    assert {entry.id for entry in entries if matches(entry, query, version=VERSION)} == expected
    assert {entry.id for entry in select(entries, query, version=VERSION)} == expected


@settings(max_examples=100)
@given(entries=ENTRIES, query=QUERIES)
def test_the_order_is_that_of_its_column_and_ties_go_by_id(
    entries: list[Entry], query: Query
) -> None:
    found = select(entries, query, version=VERSION)
    key = SORT_KEYS[query.sort]
    sign = -1 if query.order == "desc" else 1
    for before, after in pairwise(found):
        rises = (key(before) < key(after)) - (key(before) > key(after))
        assert rises == sign or (rises == 0 and before.id < after.id)


def numbered(count: int) -> list[Entry]:
    return [
        Entry(
            id=f"{number:032x}",
            task="toy",
            prompt_key="p",
            prompt="",
            num_tokens=0,
            used_tool=False,
            log_reward=float(number // 3),
            correct=None,
            version=0,
            created_s=1.0,
            tally=Tally(),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE])
def test_the_pages_together_hold_every_entry_once(count: int) -> None:
    entries = numbered(count)
    ordered = select(entries, Query(sort="reward"), version=0)
    first = Page.cut(ordered, 1)
    assert (first.matching, first.pages) == (count, max(1, -(-count // PAGE_SIZE)))
    pages = [Page.cut(ordered, number) for number in range(1, first.pages + 1)]
    assert all(len(page.entries) <= PAGE_SIZE for page in pages)
    found = [entry for page in pages for entry in page.entries]
    assert sorted(entry.id for entry in found) == [entry.id for entry in entries]
    assert [entry.log_reward for entry in found] == sorted(
        (entry.log_reward for entry in entries), reverse=True
    )


def test_a_page_beyond_the_last_is_the_last() -> None:
    page = Page.cut(numbered(PAGE_SIZE + 1), 99)
    assert (page.number, len(page.entries)) == (2, 1)


@given(query=QUERIES, page=st.integers(1, 5))
def test_an_address_leads_back_to_its_query(query: Query, page: int) -> None:
    address = query.address(page=page)
    assert parse_query(dict(parse_qsl(address.removeprefix("?")))) == query.model_copy(
        update={"page": page}
    )


def test_the_default_query_needs_no_address_and_an_empty_form_is_the_default() -> None:
    assert Query().address() == ""
    form = {"search": "", "prompt": "  ", "reward_min": "", "correct": "", "token-like": "x"}
    assert parse_query(form) == Query()
    assert not parse_query({"sort": "reward", "page": "2"}).is_filtering
    assert parse_query({"tool": "no"}).is_filtering


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"reward_min": "much"}, "reward_min"),
        ({"reward_min": "nan"}, "reward_min"),
        ({"reward_max": "inf"}, "reward_max"),
        ({"page": "0"}, "page"),
        ({"page": "1.5"}, "page"),
        ({"correct": "perhaps"}, "correct"),
        ({"sort": "__class__"}, "sort"),
        ({"search": "x" * 501}, "search"),
    ],
)
def test_what_cannot_be_read_is_named(parameters: dict[str, str], named: str) -> None:
    with pytest.raises(BadQuery, match=f"^{named}: "):
        parse_query(parameters)
