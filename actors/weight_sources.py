"""Where actors take weights from: fetched ahead; or late or in turns, to measure staleness."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Generic, Protocol, TypeVar

_POLL_S = 0.005
_LOOK_EVERY_S = 1.0
_FETCHING_SHARE = 0.2  # of the time, at most

Data = TypeVar("Data")


@dataclass(frozen=True)
class Published(Generic[Data]):
    """One version of the adapter, as the learner published it."""

    version: int
    data: Data  # its bytes, or a reference to them
    checksum: str  # of its bytes


PublishedWeights = Published[bytes]


class WeightSource(Protocol):
    """Where the learner's weights appear."""

    def newer_than(self, version: int) -> PublishedWeights | None:
        """The newest weights if they are newer than `version`, else None; never waits for any."""


class FetchedAhead:
    """Fetches new weights in a thread, so that who asks for them finds them there.

    Asking has the thread look at once, and waits `patience_s` for that: small weights are as new
    as they can be, and large ones come at a later call, fetched meanwhile.
    """

    def __init__(self, source: WeightSource, *, patience_s: float = 0.1) -> None:
        self._source, self._patience_s = source, patience_s
        self._changed = Condition()
        self._asked = False
        self._seen = -1  # newest version that was fetched, or that the caller has
        self._fresh: PublishedWeights | None = None  # fetched, and not handed out yet
        self._error: Exception | None = None  # of the last look
        Thread(target=self._run, name="weights", daemon=True).start()

    def newer_than(self, version: int) -> PublishedWeights | None:
        """The newest that are here, if newer than `version`; raises what the source raised."""
        with self._changed:
            if self._fresh is None:
                self._seen = version
            self._asked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._asked, timeout=self._patience_s)
            error, self._error = self._error, None
            if error is not None:
                raise error
            fresh, self._fresh = self._fresh, None
        return fresh if fresh is not None and fresh.version > version else None

    def _run(self) -> None:
        rest_s = _LOOK_EVERY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked, timeout=rest_s)
                seen = self._seen
            began = time.monotonic()
            fresh: PublishedWeights | None = None
            error: Exception | None = None
            try:
                fresh = self._source.newer_than(seen)
            except Exception as raised:  # the caller's to handle, who is in another thread
                error = raised
            rest_s = max(_LOOK_EVERY_S, (time.monotonic() - began) * (1 / _FETCHING_SHARE - 1))
            with self._changed:
                if fresh is not None:
                    self._fresh, self._seen = fresh, fresh.version
                self._error, self._asked = error, False
                self._changed.notify_all()
            fresh = None  # or it would be held here beside the next one


class LaggingWeights:
    """Hands out the newest version that is at least `lag` behind the newest.

    Nothing gets more than `max_lag` behind, or the buffer would drop all that is sampled. An actor
    keeps the version it has, at the start 0, for as long as that allows; then it takes the oldest
    that it has seen published since, which is too young only where it never saw the one due.
    """

    def __init__(self, source: WeightSource, *, lag: int, max_lag: int) -> None:
        if not 0 < lag <= max_lag:
            raise ValueError(f"lag {lag}, max_lag {max_lag}: need 0 < lag <= max_lag")
        self._source, self._lag, self._max_lag = source, lag, max_lag
        self._seen: deque[PublishedWeights] = deque()  # oldest first; at most one is due
        self._newest = -1

    def newer_than(self, version: int) -> PublishedWeights | None:
        """What is to be taken instead of `version`, of which -1 is none; None to keep that."""
        if (fresh := self._source.newer_than(self._newest)) is not None:
            self._seen.append(fresh)
            self._newest = fresh.version
        while len(self._seen) > 1 and self._seen[1].version <= self._newest - self._lag:
            self._seen.popleft()
        ages = (self._newest - seen.version for seen in self._seen)
        oldest = next((n for n, age in enumerate(ages) if age <= self._max_lag), None)
        if oldest is None or self._seen[oldest].version <= version:
            return None
        is_due = self._newest - self._seen[oldest].version >= self._lag
        must_go = version < 0 or self._newest - version > self._max_lag
        return self._seen[oldest] if is_due or must_go else None


class TakingTurns:
    """Sampling and learning in turns: every published version once, after a wait for the next.

    With `max_unstored` 1, and a learner that draws one batch, nobody works while another does.
    """

    def __init__(
        self, source: WeightSource, stop: Callable[[], bool], *, timeout_s: float = 600.0
    ) -> None:
        self._source, self._stop, self._timeout_s = source, stop, timeout_s
        self._begun = False

    def newer_than(self, version: int) -> PublishedWeights | None:
        """The first weights newer than `version`; None at the start, or when stopped."""
        began = time.monotonic()
        while (fresh := self._source.newer_than(version)) is None and self._begun:
            if self._stop():
                break
            if (waited := time.monotonic() - began) > self._timeout_s:
                raise TimeoutError(
                    f"learner: no version after {version} was published within {waited:.0f} s"
                )
            time.sleep(_POLL_S)
        self._begun = True
        return fresh
