"""The rollout actor: prompts go in as places become free, and trajectories are stored as they end.

Groups are scored and stored while others are being sampled. A trajectory belongs to the actor until
the buffer has acknowledged it.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import msgpack
import numpy as np

from actors.config import ActorConfig
from actors.prompts import PromptStream
from actors.protocols import PendingScores, RolloutEngine, Scorer, TrajectorySink
from actors.reward_query import RewardQuery
from actors.rollout import AskedGroup, IsCorrect, plan_groups
from actors.weight_sources import PublishedWeights, WeightSource
from buffer.trajectory import MAX_GROUP, Trajectory, pack, pack_group, read_array, unpack_group
from lm.adapter import AdapterMismatch, checksum
from lm.sampling import Request
from lm.tools import FAILED_IN_A_ROW, ToolFault

_POLL_S = 0.02
_UNSEEN_S = 5.0  # without a look at the buffer, after which it may have been drawn from unseen
# Well below cluster.stop_timeout_s, for a process that is killed then stores nothing.
_DRAIN_S = 20.0
# Groups differ in time by this, which unix seconds in float64 still resolve: the buffer takes equal
# bytes for one group sent twice, and a peaked policy samples equal groups.
_GROUP_APART_S = 1e-6

_log = logging.getLogger(__name__)


class LearnerStalled(TimeoutError):
    """The buffer stayed full: nobody draws from it."""


@dataclass(slots=True)
class ActorStats:
    """Counters since the actor started; times in seconds."""

    groups: int = 0
    trajectories: int = 0
    tokens: int = 0
    sampled: int = 0  # trajectories, stored or not yet
    unscored: int = 0  # trajectories of groups that were dropped, for a verifier or a tool failed
    tool_failures: int = 0  # completions that ended because a tool failed
    gradable: int = 0  # trajectories whose answer is known to be right or wrong
    correct: int = 0
    log_reward_sum: float = 0.0  # nats, of the final states
    version: int = 0
    sampling_s: float = 0.0
    scoring_wait_s: float = 0.0
    storing_s: float = 0.0
    paced_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Scoring:
    """Groups under way to their rewards; afterwards the trajectories that they became."""

    groups: list[AskedGroup]
    pending: PendingScores | None  # None: `found` holds what there is
    found: list[list[Trajectory]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Completions."""
        return sum(len(group.ended) for group in self.groups) + sum(map(len, self.found))

    @property
    def done(self) -> bool:
        return self.pending is None or self.pending.done()


@dataclass(slots=True, eq=False, kw_only=True)
class RolloutActor:
    """Prompts in, scored trajectories out; `policy` begins with the weights of version 0.

    A completion is of one version: weights are taken while nothing is under way, and looked for
    before a group is asked then. Once `groups_per_batch` groups were asked of a version, and there
    is a newer one, no more are asked until the last of them has ended.
    """

    name: str  # written into every trajectory
    task_name: str
    query: RewardQuery
    is_correct: IsCorrect
    prompts: PromptStream
    policy: RolloutEngine
    scorer: Scorer
    buffer: TrajectorySink
    weights: WeightSource
    config: ActorConfig
    rng: np.random.Generator
    awaits_weights: bool = False  # what it samples itself is of published weights, never its first
    stats: ActorStats = field(default_factory=ActorStats, init=False)
    _under_way: dict[int, tuple[AskedGroup, int]] = field(default_factory=dict, init=False)
    _ended: list[AskedGroup] = field(default_factory=list, init=False)  # not submitted to a scorer
    _in_flight: list[_Scoring] = field(default_factory=list, init=False)  # oldest first
    _until_look: int = field(default=0, init=False)  # groups to be asked before newer weights are
    _fresh: PublishedWeights | None = field(default=None, init=False)  # to be taken
    _failed_groups: int = field(default=0, init=False)  # that tools ended, one after the other
    _full_since_s: float | None = field(default=None, init=False)  # the buffer; None: it is not
    _looked_s: float = field(default=0.0, init=False)  # at the buffer, by the monotonic clock
    _created_s: float = field(default=0.0, init=False)  # the newest group, in unix seconds

    def run(self, stop: Callable[[], bool], *, in_turns: bool = False) -> None:
        """Sample, score and store until `stop()`; then finish what ends soon, abandon the rest, and
        store what has ended.

        Args:
            in_turns: one `step` after the other, rather than taking places as they become free.
        """
        while self.awaits_weights and not stop():
            if (first := self.weights.newer_than(-1)) is not None:
                self._fresh = first
                break
            self._pause()
        while not stop():
            if in_turns:
                if self._has_room():
                    self.step()
                else:
                    self._pause()
                continue
            while self._may_ask():
                self._ask(1)
            self._advance()
        drained_s = time.monotonic() + _DRAIN_S
        while self._under_way and time.monotonic() < drained_s:
            self._advance()
        if self._under_way:
            _log.warning("%s: stops with %d completions unended", self.name, len(self._under_way))
            self._under_way.clear()
        self.flush()

    def step(self) -> None:
        """Sample a whole batch and let it be scored; store the oldest while too many are unstored.

        What it does follows from the seed alone, not from the time that anything takes.
        """
        self._take(self._fresh or self.weights.newer_than(self.stats.version))
        self._fresh = None
        self._ask(self.config.groups_per_batch)
        while self._under_way:
            self._poll()
        self._score()
        while self._unstored >= self.config.in_flight_limit:
            self._store(self._in_flight[0])

    def flush(self) -> None:
        """Wait for every scoring in flight and store its groups."""
        while self._in_flight:
            self._store(self._in_flight[0])

    def save(self) -> bytes:
        """All that sampling on needs, but for the policy, between two calls of `step`; waits for
        the scores in flight."""
        in_flight = []
        for scoring in self._in_flight:
            self._wait_for(scoring)
            in_flight.append(pack_group([pack_group([pack(t) for t in g]) for g in scoring.found]))
        random = [self.rng.bit_generator.state, self.prompts.rng.bit_generator.state]
        return msgpack.packb([json.dumps(random), asdict(self.stats), in_flight])

    def restore(self, data: bytes) -> None:
        """Sample on from the moment of `save`, with weights to be fetched anew."""
        random, stats, in_flight = msgpack.unpackb(data)
        self.rng.bit_generator.state, self.prompts.rng.bit_generator.state = json.loads(random)
        self.stats = ActorStats(**(stats | {"version": -1}))
        for batch in in_flight:
            groups = [list(unpack_group(group)) for group in read_array(batch, max_len=MAX_GROUP)]
            self._in_flight.append(_Scoring([], None, groups))

    @property
    def _unstored(self) -> int:
        """Completions that have ended and are not stored."""
        return sum(scoring.size for scoring in self._in_flight)

    def _may_ask(self) -> bool:
        """Whether a group may be asked now; takes newer weights where their time has come."""
        if self._fresh is not None and self._under_way:
            return False
        has_place = len(self._under_way) < self.config.max_rows
        if not (has_place and self._unstored < self.config.in_flight_limit and self._has_room()):
            return False
        # Last, so that no group is asked of weights that were the newest before a pause.
        if self._fresh is None and (self._until_look <= 0 or not self._under_way):
            self._fresh = self.weights.newer_than(self.stats.version)
            self._until_look = self.config.groups_per_batch
        if self._fresh is not None:
            if self._under_way:
                return False
            self._take(self.weights.newer_than(self._fresh.version) or self._fresh)
            self._fresh, self._until_look = None, self.config.groups_per_batch
        return True

    def _has_room(self) -> bool:
        """Whether the buffer wants more groups; LearnerStalled where it has not for too long."""
        now = time.monotonic()
        if self._full_since_s is not None:
            if (unseen_s := now - self._looked_s) < _POLL_S:
                return False
            if unseen_s > _UNSEEN_S:
                self._full_since_s = None
        self._looked_s = now
        if (depth := self.buffer.depth()) < self.config.max_ready_groups:
            self._full_since_s = None
            return True
        if self._full_since_s is None:
            self._full_since_s = now
        if (waited := now - self._full_since_s) > self.config.pace_timeout_s:
            raise LearnerStalled(
                f"{self.name}: the buffer has held {depth} groups that no learner drew for "
                f"{waited:.0f} s (actors.pace_timeout_s); is the learner alive?"
            )
        return False

    def _pause(self) -> None:
        """Wait a moment; for the learner, where the buffer is full."""
        started = time.monotonic()
        time.sleep(_POLL_S)
        if self._full_since_s is not None:
            self.stats.paced_s += time.monotonic() - started

    def _take(self, fresh: PublishedWeights | None) -> None:
        if fresh is None:
            return
        if (seen := checksum(fresh.data)) != fresh.checksum:
            raise AdapterMismatch(
                f"{self.name}: weights of version {fresh.version} have checksum {seen}, "
                f"published as {fresh.checksum}; not loaded"
            )
        self.policy.load(fresh.data)
        self.stats.version = fresh.version

    def _ask(self, count: int) -> None:
        """Submit so many groups, each of one prompt and one temperature."""
        started = time.monotonic()
        size = self.config.group_size
        plans = plan_groups(self.prompts.take(count), self.config, self.rng)
        requests = [
            Request(prompt=plan.prompt.prompt, temperature=plan.temperature)
            for plan in plans
            for _ in range(size)
        ]
        numbers = self.policy.submit(requests)
        for at, plan in zip(range(0, len(numbers), size), plans, strict=True):
            group = AskedGroup(plan, self.stats.version, numbers[at], [None] * size)
            self._under_way |= {numbers[at + place]: (group, place) for place in range(size)}
        self._until_look -= count
        self.stats.sampling_s += time.monotonic() - started

    def _advance(self) -> None:
        """Sample on; hand what has ended to the scorer, and what is scored to the buffer."""
        if self._under_way:
            self._poll()
            self._score()
        elif self._in_flight and self._full_since_s is None:
            self._store(self._in_flight[0])
        else:
            self._pause()
        for scoring in [scoring for scoring in self._in_flight if scoring.done]:
            self._store(scoring)

    def _poll(self) -> None:
        started = time.monotonic()
        for number, ended in self.policy.poll():
            group, place = self._under_way.pop(number)
            group.ended[place] = ended
            if isinstance(ended, ToolFault):
                self.stats.tool_failures += 1
                _log.warning("%s: a tool ended a completion: %s", self.name, ended.reason)
            else:
                self.stats.tokens += len(ended.tokens)
                self.stats.sampled += 1
            if None not in group.ended:
                self._ended.append(group)
        self.stats.sampling_s += time.monotonic() - started

    def _score(self) -> None:
        """Submit the groups that have ended to the scorer, but for those that a tool ended."""
        groups = sorted(self._ended, key=lambda group: group.number)
        self._ended = []
        for group in groups:
            self._created_s = max(time.time(), self._created_s + _GROUP_APART_S)
            group.created_s = self._created_s
            if not group.faults:
                self._failed_groups = 0
                continue
            self.stats.unscored += len(group.completions)
            self._failed_groups += 1
            if self._failed_groups >= FAILED_IN_A_ROW:
                raise group.faults[0].error
        if whole := [group for group in groups if not group.faults]:
            items = [
                self.query.item(group.plan.prompt, completion.tokens, completion.stops)
                for group in whole
                for completion in group.completions
            ]
            self._in_flight.append(_Scoring(whole, self.scorer.submit(self.query.asked(items))))

    def _wait_for(self, scoring: _Scoring) -> None:
        """Let the groups become trajectories, but for those of which a completion has no reward:
        [0], because a verifier failed on it."""
        if scoring.pending is None:
            return
        scores = self.query.judged(scoring.pending.result(self.config.score_timeout_s))
        size = self.config.group_size
        portions = (scores[at : at + size] for at in range(0, len(scores), size))
        found = [
            group.trajectories(log_rewards, self.is_correct, task=self.task_name, actor=self.name)
            for group, log_rewards in zip(scoring.groups, portions, strict=True)
            if all(map(len, log_rewards))
        ]
        self.stats.unscored += size * (len(scoring.groups) - len(found))
        scoring.groups, scoring.pending, scoring.found = [], None, found

    def _store(self, scoring: _Scoring) -> None:
        started = time.monotonic()
        self._wait_for(scoring)
        scored = time.monotonic()
        for group in scoring.found:
            self.buffer.add(group)
        self._in_flight.remove(scoring)
        stored = time.monotonic()
        stats = self.stats
        stats.scoring_wait_s += scored - started
        stats.storing_s += stored - scored
        stats.groups += len(scoring.found)
        for trajectory in (t for group in scoring.found for t in group):
            stats.trajectories += 1
            stats.log_reward_sum += float(trajectory.log_reward[-1])
            stats.gradable += trajectory.correct is not None
            stats.correct += trajectory.correct is True
