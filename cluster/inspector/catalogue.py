"""The replay buffer as the inspector knows it: an index that is brought up to date on request.

The buffer serves a run, and must not notice that somebody watches. So refreshes read only small
fields of what has changed, in portions until their time is up, and take a small share of the time.
Rationales are read and decoded for the rows of a page, and where a search needs them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from buffer.browser import ReplayBrowser, Tally
from buffer.stats import ReplayStats
from cluster.inspector.queries import Page, Query, select
from cluster.inspector.rows import Entry, row_of
from lm.spelling import Decode

_BUDGET_S = 1.5
_SHARE = 0.1
_SHORTEST_REST_S = 1.0
_PROMPTS_AT_ONCE = 20
_SEARCHED_AT_ONCE = 50
_REMEMBERED_SEARCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The index as of one refresh."""

    entries: Sequence[Entry]
    stats: ReplayStats
    unread_prompts: int  # prompts whose changes the next refreshes will read


class Catalogue:
    """Keeps the index; safe to share between threads. Every method raises BufferUnreachable."""

    def __init__(
        self, browser: ReplayBrowser, decode: Decode, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._browser = browser
        self._decode = decode
        self._clock = clock
        self._reading = threading.Lock()
        self._next_s = float("-inf")
        self._revisions: dict[str, int] = {}
        self._prompts: dict[str, str] = {}  # their texts, by key
        self._entries: dict[str, dict[str, Entry]] = {}  # prompt -> id -> entry
        self._listing: Listing | None = None
        self._searching = threading.Lock()
        self._mentions: dict[str, dict[str, bool]] = {}  # searched text -> id -> whether it has it

    def listing(self) -> Listing:
        """The index, refreshed if it is time and no other thread is at it."""
        if self._listing is None:
            with self._reading:
                return self._listing or self._refresh()
        if self._clock() < self._next_s or not self._reading.acquire(blocking=False):
            return self._listing
        try:
            return self._refresh()
        finally:
            self._reading.release()

    def page(self, listing: Listing, query: Query) -> Page:
        """The rows that the query asks for, read now; those gone since the refresh are left out."""
        entries = select(listing.entries, query, version=listing.stats.version)
        unsearched = 0
        if query.search is not None:
            entries, unsearched = self._search(entries, query.search.casefold())
        page = Page.cut(entries, query.page, unsearched=unsearched)
        tallies = {entry.id: entry.tally for entry in page.entries}
        found = {t.id: t for t in self._browser.trajectories(list(tallies))}
        rows = [row_of(found[id], self._decode, tallies[id]) for id in tallies if id in found]
        return replace(page, rows=rows)

    def _refresh(self) -> Listing:
        began = self._clock()
        stats = self._browser.stats()
        revisions = self._browser.revisions()
        changed = [name for name, seen in revisions.items() if self._revisions.get(name) != seen]
        unread = len(changed)
        for start in range(0, len(changed), _PROMPTS_AT_ONCE):
            portion = changed[start : start + _PROMPTS_AT_ONCE]
            self._read(portion)
            self._revisions.update((name, revisions[name]) for name in portion)
            unread -= len(portion)
            if self._clock() - began > _BUDGET_S:
                break
        tallies = self._browser.tallies()
        self._listing = Listing(
            entries=[
                replace(entry, tally=tallies[id]) if id in tallies else entry
                for entries in self._entries.values()
                for id, entry in entries.items()
            ],
            stats=stats,
            unread_prompts=unread,
        )
        took_s = self._clock() - began
        # Nobody is held up by an index that is still being built, but the person who waits for it.
        rest_s = _SHORTEST_REST_S if unread else max(_SHORTEST_REST_S, took_s / _SHARE)
        self._next_s = self._clock() + rest_s
        return self._listing

    def _read(self, prompts: Sequence[str]) -> None:
        """Read some prompts anew; the text of a known prompt is not decoded again."""
        by_prompt = self._browser.ids(prompts)
        pairs = zip(prompts, by_prompt, strict=True)
        firsts = [ids[0] for prompt, ids in pairs if ids and prompt not in self._prompts]
        for trajectory in self._browser.trajectories(firsts):
            self._prompts[trajectory.prompt_key] = self._decode(trajectory.prompt.tolist())
        self._entries |= {prompt: {} for prompt in prompts}
        for summary in self._browser.summaries([id for ids in by_prompt for id in ids]):
            text = self._prompts.get(summary.prompt_key, "")
            entry = Entry(**asdict(summary), prompt=text, tally=Tally())
            self._entries[summary.prompt_key][summary.id] = entry

    def _search(self, entries: Sequence[Entry], folded: str) -> tuple[list[Entry], int]:
        """Those that mention the text, and how many there was no time to read.

        What has been read is remembered for the next request, which goes on from there.
        """
        with self._searching:
            mentions = self._mentions.pop(folded, {})
            self._mentions[folded] = mentions  # the latest stands last
            while len(self._mentions) > _REMEMBERED_SEARCHES:
                del self._mentions[next(iter(self._mentions))]
            unread = []
            for entry in entries:
                if entry.id.startswith(folded) or folded in entry.prompt.casefold():
                    mentions[entry.id] = True
                elif entry.id not in mentions:
                    unread.append(entry.id)
            began, read = self._clock(), 0
            while read < len(unread) and self._clock() - began <= _BUDGET_S:
                portion = unread[read : read + _SEARCHED_AT_ONCE]
                mentions.update(dict.fromkeys(portion, False))
                for t in self._browser.trajectories(portion):
                    texts = (self._decode(part.tolist()) for part in (t.completion, t.answer))
                    mentions[t.id] = any(folded in text.casefold() for text in texts)
                read += len(portion)
            found = [entry for entry in entries if mentions.get(entry.id, False)]
            return found, max(0, len(unread) - read)
