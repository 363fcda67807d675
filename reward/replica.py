"""A reward replica: takes items from many callers and scores them on W ranks in lockstep."""

import logging
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Condition, Thread
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from reward.config import RewardConfig
from reward.lockstep import Peer, Rank, forward_in_step
from reward.packing import gather_scores, lay_out
from reward.request import BadItem, ScoreItem, check_item

logger = logging.getLogger(__name__)

Scores = list[NDArray[np.float32]]


class ScoreFailed(RuntimeError):
    """The replica could not score, or not in time; another replica may."""


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
    unmoved_s: float = 0.0  # since passes began, or a micro-batch was scored
    waiting_s: float = 0.0  # without requests
    computing_s: float = 0.0
    tokens_per_s: float = 0.0  # while computing


@dataclass(slots=True, eq=False)
class PendingScores:
    """A scoring under way."""

    items: Sequence[ScoreItem]
    replica: str
    deadline_s: float
    phase: str = "queue"
    scores: Future[Scores] = field(default_factory=Future)
    arrived: float = field(default_factory=monotonic)
    moved: float = 0.0  # when the replica scored a micro-batch before this one was too late

    @property
    def late(self) -> bool:
        """Whether it has seen the replica come no further for the deadline."""
        return monotonic() - max(self.arrived, self.moved) > self.deadline_s

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self.scores.done()

    def result(self, timeout_s: float) -> Scores:
        """Log-rewards [S] in nats for each item, else BadItem.

        ScoreFailed after `timeout_s` in which the replica came no further.
        """
        asked = monotonic()
        while True:
            try:
                left_s = max(asked, self.moved) + timeout_s - monotonic()
                return self.scores.result(max(0.0, left_s))
            except TimeoutError:
                if monotonic() < max(asked, self.moved) + timeout_s:
                    continue
                raise ScoreFailed(
                    f"reward replica {self.replica}: no scores for {len(self.items)} items after "
                    f"{timeout_s:.1f} s, request is in phase {self.phase}"
                ) from None


class RewardReplica:
    """Scores what any number of threads submit; one worker thread talks to the ranks.

    The worker takes whole requests in order of arrival, as many as fill one micro-batch on each
    rank. It waits for requests, and for the ranks at most their process group's timeout. A pass
    that fails leaves the ranks out of step: the replica is then broken, refuses everything at once,
    and is to be built anew with all its ranks.
    """

    def __init__(
        self, rank: Rank, peers: Sequence[Peer], config: RewardConfig, *, name: str
    ) -> None:
        self._name = name
        self._config = config
        self._limits = rank.limits
        self._rank, self._peers = rank, peers
        self._num_ranks = 1 + len(peers)
        # By content, least recently used first; exact, for the model is frozen.
        self._cache: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._stats = ReplicaStats()  # of the worker thread; others read it as it stands
        self._queue: deque[PendingScores] = deque()
        self._changed = Condition()
        self._refusal: str | None = None  # why nothing is scored any more
        self._in_pass: Sequence[PendingScores] = ()
        self._moved = monotonic()  # when passes began, or a micro-batch was scored
        self._worker = Thread(target=self._serve, name=f"reward-{name}", daemon=True)
        self._worker.start()

    def submit(self, items: Sequence[ScoreItem]) -> PendingScores:
        """Queue items, else BadItem, or ScoreFailed once broken or closed; returns at once."""
        for number, item in enumerate(items):
            try:
                check_item(item, self._limits)
            except BadItem as error:
                raise BadItem(f"item {number} of {len(items)}: {error}") from None
        request = PendingScores(items, self._name, self._config.deadline_s)
        with self._changed:
            if self._refusal is not None:
                raise ScoreFailed(self._refusal)
            self._queue.append(request)
            self._changed.notify()
        return request

    def score(self, items: Sequence[ScoreItem]) -> Scores:
        """Submit and wait, for the replica's deadline from its last progress; errors as there."""
        return self.submit(items).result(self._config.deadline_s)

    def healthy(self) -> bool:
        """False once broken or closed, or while a micro-batch has outlasted the deadline."""
        stuck = self._in_pass and monotonic() - self._moved > self._config.deadline_s
        return self._refusal is None and not stuck

    def stats(self) -> ReplicaStats:
        with self._changed:
            waiting = [len(request.items) for request in self._queue]
        now = {"queued_requests": len(waiting), "queued_items": sum(waiting)}
        return replace(self._stats, **now, unmoved_s=monotonic() - self._moved)

    def close(self, timeout_s: float) -> None:
        """Fail what is queued and end the worker; ScoreFailed if a pass outlasts the wait."""
        self._refuse(f"reward replica {self._name} was closed")
        self._worker.join(timeout_s)
        if self._worker.is_alive():
            raise ScoreFailed(
                f"reward replica {self._name}: a pass is still under way after {timeout_s:.1f} s"
            )

    def _serve(self) -> None:
        while round_of_requests := self._next_round():
            self._moved = start = monotonic()
            self._in_pass = round_of_requests
            try:
                self._answer(round_of_requests)
            except Exception as error:  # the loop's rim: whatever it was, the ranks are out of step
                logger.exception("reward replica %s broke", self._name)
                refusal = (
                    f"reward replica {self._name} broke in a pass over {self._num_ranks} ranks "
                    f"after {monotonic() - start:.1f} s: {error}"
                )
                self._refuse(refusal)
                self._fail(round_of_requests, refusal)
            finally:
                self._in_pass = ()
                self._stats.computing_s += monotonic() - start
                self._stats.tokens_per_s = self._stats.computed_tokens / self._stats.computing_s

    def _next_round(self) -> list[PendingScores]:
        """The requests of the next passes; none once the replica refuses."""
        start = monotonic()
        with self._changed:
            while not (chosen := self._take()) and self._refusal is None:
                self._changed.wait()
        self._stats.waiting_s += monotonic() - start
        return chosen

    def _take(self) -> list[PendingScores]:
        """Requests in order of arrival that fill one micro-batch on each rank; at least one."""
        room = self._config.token_budget * self._num_ranks
        chosen: list[PendingScores] = []
        while self._queue and room > 0:
            request = self._queue.popleft()
            self._stats.queued_s += monotonic() - request.arrived
            if request.late:
                self._stats.expired_requests += 1
                error = ScoreFailed(
                    f"reward replica {self._name}: {len(request.items)} items spent the deadline "
                    f"of {self._config.deadline_s:.1f} s in phase {request.phase}"
                )
                request.scores.set_exception(error)
                continue
            request.phase = "pass"
            room -= sum(item.num_tokens for item in request.items)
            chosen.append(request)
        return chosen

    def _move(self) -> None:
        """Have scored one more micro-batch: who waits may wait on."""
        self._moved = monotonic()
        with self._changed:
            for request in (*self._queue, *self._in_pass):
                if not request.late:
                    request.moved = self._moved

    def _answer(self, requests: Sequence[PendingScores]) -> None:
        """Score what the requests ask for and is not cached, each distinct item once."""
        wanted = {item.key: item for request in requests for item in request.items}
        known = {key: self._cache[key] for key in wanted if key in self._cache}
        fresh = {key: item for key, item in wanted.items() if key not in known}
        if fresh:
            items = list(fresh.values())
            layout = lay_out(items, self._config.token_budget, self._num_ranks)
            edges = forward_in_step(
                self._rank,
                self._peers,
                layout.batches,
                deadline_s=self._config.deadline_s,
                scored=self._move,
            )
            known.update(zip(fresh, gather_scores(items, layout, edges), strict=True))
            self._stats.computed_items += len(items)
            self._stats.computed_tokens += sum(batch.num_tokens for batch in layout.batches)
        self._remember(known)
        for request in requests:
            self._stats.answered_requests += 1
            self._stats.answered_items += len(request.items)
            self._settle(request, [known[item.key] for item in request.items])

    def _remember(self, used: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Keep scores that were used just now; the least recently used are forgotten for them."""
        for key, values in used.items():
            values.flags.writeable = False
            self._cache[key] = values
            self._cache.move_to_end(key)
        while len(self._cache) > self._config.cache_items:
            self._cache.popitem(last=False)

    def _settle(self, request: PendingScores, scores: Scores) -> None:
        for number, values in enumerate(scores):
            if not np.isfinite(values).all():
                error = BadItem(
                    f"item {number} of {len(scores)}: the model gives it the log-rewards "
                    f"{values.tolist()}, which are not all finite"
                )
                request.scores.set_exception(error)
                return
        request.scores.set_result(scores)

    def _refuse(self, reason: str) -> None:
        """Score nothing from now on and fail what is queued."""
        with self._changed:
            self._refusal = self._refusal or reason
            abandoned = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._fail(abandoned, reason)

    def _fail(self, requests: Sequence[PendingScores], reason: str) -> None:
        for request in requests:
            self._stats.failed_requests += 1
            request.scores.set_exception(ScoreFailed(reason))
