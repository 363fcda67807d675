"""A reward replica: takes items from many callers and scores them on W ranks in lockstep."""

import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Condition, Thread
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from reward.config import RewardConfig
from reward.lockstep import Lockstep, Peer, Rank
from reward.packing import gather_scores, lay_out
from reward.request import BadItem, ScoreItem, check_item

logger = logging.getLogger(__name__)

Scores = list[NDArray[np.float32]]


class ScoreFailed(RuntimeError):
    """The replica could not score; another replica may."""


class ScoreTimeout(TimeoutError):
    """No scores within the deadline; another replica may be faster."""


@dataclass(slots=True, kw_only=True)
class ReplicaStats:
    """Counts since the replica's start, and its queue now."""

    queued_requests: int = 0
    queued_items: int = 0
    queued_s: float = 0.0  # in the queue, summed over requests
    answered_requests: int = 0
    answered_items: int = 0
    computed_items: int = 0  # the rest of the answered ones was cached or asked for twice
    computed_tokens: int = 0  # of padded passes
    expired_requests: int = 0  # spent their deadline in the queue
    failed_requests: int = 0
    waiting_s: float = 0.0  # without requests
    computing_s: float = 0.0
    tokens_per_s: float = 0.0  # while computing


class _ScoreCache:
    """Scores by content, at most `capacity`, the least recently used forgotten. One thread.

    Exact: the model is frozen, so an item's scores never change.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._scores: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(self, keys: Iterable[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Scores of those keys that are known."""
        known = {key: self._scores[key] for key in keys if key in self._scores}
        for key in known:
            self._scores.move_to_end(key)
        return known

    def put(self, scores: Mapping[bytes, NDArray[np.float32]]) -> None:
        for key, values in scores.items():
            values.flags.writeable = False
            self._scores[key] = values
        while len(self._scores) > self._capacity:
            self._scores.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Request:
    items: Sequence[ScoreItem]
    deadline: float  # of the monotonic clock
    phase: str = "queue"
    scores: Future[Scores] = field(default_factory=Future)


class PendingScores:
    """A scoring under way."""

    def __init__(self, request: _Request, replica: str) -> None:
        self._request = request
        self._replica = replica

    def result(self, timeout_s: float) -> Scores:
        """Log-rewards [S] in nats for each item, in order.

        Raises:
            BadItem: an item of this request cannot be scored.
            ScoreFailed: the replica broke or was closed.
            ScoreTimeout: not done within `timeout_s` from now, or within the replica's deadline.
        """
        try:
            return self._request.scores.result(timeout_s)
        except ScoreTimeout:
            raise
        except TimeoutError:
            raise ScoreTimeout(
                f"reward replica {self._replica}: no scores for {len(self._request.items)} items "
                f"after {timeout_s:.1f} s, request is in phase {self._request.phase}"
            ) from None


class RewardReplica:
    """Scores what any number of threads submit; one worker thread talks to the ranks.

    The worker consumes whole requests in order of arrival, as many as fill one micro-batch on each
    rank, and answers each by its Future. It waits for requests (unblocked by `submit` and `close`)
    and for the ranks (unblocked by their result or by their process group's timeout). A pass that
    fails leaves the ranks out of step: the replica is then broken, refuses everything at once, and
    is to be built anew with all its ranks.
    """

    def __init__(
        self, rank: Rank, peers: Sequence[Peer], config: RewardConfig, *, name: str
    ) -> None:
        self._name = name
        self._config = config
        self._limits = rank.limits
        self._lockstep = Lockstep(rank, peers, deadline_s=config.deadline_s)
        self._cache = _ScoreCache(config.cache_items)
        self._stats = ReplicaStats()  # of the worker thread; others read it as it stands
        self._queue: deque[_Request] = deque()
        self._changed = Condition()
        self._refusal: str | None = None  # why nothing is scored any more
        self._pass_deadline: float | None = None
        self._worker = Thread(target=self._serve, name=f"reward-{name}", daemon=True)
        self._worker.start()

    def submit(self, items: Sequence[ScoreItem]) -> PendingScores:
        """Queue items; returns at once.

        Raises:
            BadItem: names the item, the field and the bound.
            ScoreFailed: the replica is broken or closed.
        """
        for number, item in enumerate(items):
            try:
                check_item(item, self._limits)
            except BadItem as error:
                raise BadItem(f"item {number} of {len(items)}: {error}") from None
        request = _Request(items, monotonic() + self._config.deadline_s)
        with self._changed:
            if self._refusal is not None:
                raise ScoreFailed(self._refusal)
            self._queue.append(request)
            self._changed.notify()
        return PendingScores(request, self._name)

    def score(self, items: Sequence[ScoreItem]) -> Scores:
        """Submit and wait, at most for the replica's deadline; errors as there."""
        return self.submit(items).result(self._config.deadline_s)

    def healthy(self) -> bool:
        """False once broken or closed, or while a pass has outlasted the deadline."""
        deadline = self._pass_deadline
        return self._refusal is None and (deadline is None or monotonic() < deadline)

    def stats(self) -> ReplicaStats:
        """Counters since the start and the present queue."""
        with self._changed:
            waiting = [len(request.items) for request in self._queue]
        return replace(self._stats, queued_requests=len(waiting), queued_items=sum(waiting))

    def close(self, timeout_s: float) -> None:
        """Fail what is queued and end the worker; ScoreTimeout if a pass outlasts the wait."""
        self._refuse(f"reward replica {self._name} was closed")
        self._worker.join(timeout_s)
        if self._worker.is_alive():
            raise ScoreTimeout(
                f"reward replica {self._name}: a pass is still under way after {timeout_s:.1f} s"
            )

    def _serve(self) -> None:
        while round_of_requests := self._next_round():
            start = monotonic()
            self._pass_deadline = start + self._config.deadline_s
            try:
                self._answer(round_of_requests)
            except Exception as error:  # the loop's rim: whatever it was, the ranks are out of step
                logger.exception("reward replica %s broke", self._name)
                phase = f"pass over {self._lockstep.num_ranks} ranks"
                refusal = (
                    f"reward replica {self._name} broke in a {phase} after "
                    f"{monotonic() - start:.1f} s: {error}"
                )
                self._refuse(refusal)
                self._fail(round_of_requests, refusal)
            finally:
                self._pass_deadline = None
                self._stats.computing_s += monotonic() - start
                self._stats.tokens_per_s = self._stats.computed_tokens / self._stats.computing_s

    def _next_round(self) -> list[_Request]:
        """The requests of the next passes; none once the replica refuses."""
        start = monotonic()
        chosen: list[_Request] = []
        while not chosen and self._refusal is None:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._refusal is not None)
                chosen = self._take()
        self._stats.waiting_s += monotonic() - start
        return chosen

    def _take(self) -> list[_Request]:
        """Requests in order of arrival that fill one micro-batch on each rank; at least one."""
        room = self._config.token_budget * self._lockstep.num_ranks
        chosen: list[_Request] = []
        while self._queue and room > 0:
            request = self._queue.popleft()
            left_s = request.deadline - monotonic()
            self._stats.queued_s += self._config.deadline_s - left_s
            if left_s < 0:
                self._expire(request)
                continue
            request.phase = "pass"
            room -= sum(item.num_tokens for item in request.items)
            chosen.append(request)
        return chosen

    def _answer(self, requests: Sequence[_Request]) -> None:
        """Score what the requests ask for and is not cached, each distinct item once."""
        wanted = {item.key: item for request in requests for item in request.items}
        known = self._cache.get(wanted)
        fresh = {key: item for key, item in wanted.items() if key not in known}
        if fresh:
            items = list(fresh.values())
            layout = lay_out(items, self._config.token_budget, self._lockstep.num_ranks)
            scores = gather_scores(items, layout, self._lockstep.forward(layout.batches))
            known.update(zip(fresh, scores, strict=True))
            self._cache.put(dict(zip(fresh, scores, strict=True)))
            self._stats.computed_items += len(items)
            self._stats.computed_tokens += sum(batch.num_tokens for batch in layout.batches)
        for request in requests:
            self._stats.answered_requests += 1
            self._stats.answered_items += len(request.items)
            self._settle(request, [known[item.key] for item in request.items])

    def _settle(self, request: _Request, scores: Scores) -> None:
        for number, values in enumerate(scores):
            if not np.isfinite(values).all():
                request.scores.set_exception(
                    BadItem(
                        f"item {number} of {len(scores)}: the model gives it the log-rewards "
                        f"{values.tolist()}, which are not all finite"
                    )
                )
                return
        request.scores.set_result(scores)

    def _expire(self, request: _Request) -> None:
        self._stats.expired_requests += 1
        request.scores.set_exception(
            ScoreTimeout(
                f"reward replica {self._name}: {len(request.items)} items spent the deadline of "
                f"{self._config.deadline_s:.1f} s in phase {request.phase}"
            )
        )

    def _refuse(self, reason: str) -> None:
        """Score nothing from now on and fail what is queued."""
        with self._changed:
            self._refusal = self._refusal or reason
            abandoned = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._fail(abandoned, reason)

    def _fail(self, requests: Sequence[_Request], reason: str) -> None:
        for request in requests:
            self._stats.failed_requests += 1
            request.scores.set_exception(ScoreFailed(reason))
