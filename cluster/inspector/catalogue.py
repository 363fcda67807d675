"""The replay buffer as the inspector knows it: an index of rows, brought up to date on request.

The buffer serves a run, and must not notice that somebody watches. So what has not changed is
not read again, a refresh reads in portions and ends when its time is up, to be continued by the
next, and refreshes take up a small share of the time.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from buffer.browser import ReplayBrowser, Tally
from buffer.stats import ReplayStats
from cluster.inspector.rows import Decode, Row, Texts, row_of, texts_of

_BUDGET_S = 1.5
_SHARE = 0.1
_SHORTEST_REST_S = 1.0
_PROMPTS_AT_ONCE = 20
_NOTHING = Tally()


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The index as of one refresh."""

    rows: Sequence[Row]
    stats: ReplayStats
    unread_prompts: int  # prompts whose changes the next refreshes will read
    read_s: float  # unix seconds


class Catalogue:
    """Keeps the index; safe to share between threads.

    Args:
        decode: token ids to text.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        browser: ReplayBrowser,
        decode: Decode,
        *,
        budget_s: float = _BUDGET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._browser = browser
        self._decode = decode
        self._budget_s = budget_s
        self._clock = clock
        self._reading = threading.Lock()
        self._next_s = float("-inf")
        self._revisions: dict[str, int] = {}
        self._rows: dict[str, dict[str, Row]] = {}  # prompt -> id -> row
        self._listing: Listing | None = None

    def listing(self) -> Listing:
        """The index, refreshed if it is time and no other thread is at it.

        Raises BufferUnreachable.
        """
        if self._listing is None:
            with self._reading:
                return self._listing or self._refresh()
        if self._clock() < self._next_s or not self._reading.acquire(blocking=False):
            return self._listing
        try:
            return self._refresh()
        finally:
            self._reading.release()

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
            if self._clock() - began > self._budget_s:
                break
        tallies = self._browser.tallies()
        self._listing = Listing(
            rows=[
                with_tally(row, tallies.get(id, _NOTHING))
                for rows in self._rows.values()
                for id, row in rows.items()
            ],
            stats=stats,
            unread_prompts=unread,
            read_s=time.time(),
        )
        took_s = self._clock() - began
        # Nobody is held up by an index that is still being built, but the person who waits for it.
        rest_s = _SHORTEST_REST_S if unread else max(_SHORTEST_REST_S, took_s / _SHARE)
        self._next_s = self._clock() + rest_s
        return self._listing

    def _read(self, prompts: Sequence[str]) -> None:
        """Read some prompts anew; the texts of what is known are not decoded again."""
        by_prompt = self._browser.ids(prompts)
        ids = [id for ids in by_prompt for id in ids]
        found = {t.id: t for t in self._browser.trajectories(ids)}
        for prompt, ids in zip(prompts, by_prompt, strict=True):
            known = self._rows.get(prompt, {})
            self._rows[prompt] = {
                id: row_of(
                    found[id],
                    texts_in(known[id]) if id in known else texts_of(found[id], self._decode),
                    _NOTHING,
                )
                for id in ids
                if id in found
            }


def texts_in(row: Row) -> Texts:
    """The texts that a row was made with."""
    return Texts(row.prompt, row.pieces, row.answer)


def with_tally(row: Row, tally: Tally) -> Row:
    """The row with this tally."""
    return row if row.tally == tally else replace(row, tally=tally)
