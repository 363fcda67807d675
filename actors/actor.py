"""The rollout actor: while one batch is being scored, it samples the next.

A trajectory belongs to the actor until the buffer has acknowledged it.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import msgpack
import numpy as np

from actors.config import ActorConfig
from actors.prompts import PromptStream
from actors.protocols import PendingScores, RolloutEngine, Scorer, TrajectorySink
from actors.reward_query import RewardQuery
from actors.rollout import GroupPlan, IsCorrect, join, plan_groups
from actors.weight_sources import WeightSource
from buffer.trajectory import MAX_GROUP, Trajectory, pack, pack_group, read_array, unpack_group
from lm.adapter import AdapterMismatch, checksum
from lm.sampling import Completion, Request

_PACE_POLL_S = 0.02
# Groups of one batch differ in time by this, which unix seconds in float64 still resolve: the
# buffer takes equal bytes for one group sent twice, and a peaked policy samples equal groups.
_GROUP_APART_S = 1e-6

_InFlight = Callable[[], list[list[Trajectory]]]  # waits for the scores of a batch; its groups


class LearnerStalled(TimeoutError):
    """The buffer stayed full: nobody draws from it."""


@dataclass(slots=True)
class ActorStats:
    """Counters since the actor started; times in seconds."""

    groups: int = 0
    trajectories: int = 0
    tokens: int = 0
    sampled: int = 0  # trajectories, stored or not yet
    unscored: int = 0  # trajectories of groups that were dropped, for a verifier failed
    gradable: int = 0  # trajectories whose answer is known to be right or wrong
    correct: int = 0
    log_reward_sum: float = 0.0  # nats, of the final states
    version: int = 0
    sampling_s: float = 0.0
    scoring_wait_s: float = 0.0
    storing_s: float = 0.0
    paced_s: float = 0.0


@dataclass(slots=True, eq=False, kw_only=True)
class RolloutActor:
    """Prompts in, scored trajectories out; `policy` begins with the weights of version 0."""

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
    stats: ActorStats = field(default_factory=ActorStats, init=False)
    _in_flight: deque[_InFlight] = field(default_factory=deque, init=False)  # oldest first

    def run(self, stop: Callable[[], bool]) -> None:
        """Sample, score and store until `stop()`; then finish what is in flight."""
        while not stop():
            if self._pace(stop):
                self.step()
        self.flush()

    def step(self) -> None:
        """Sample one batch; store the oldest batch once `max_in_flight` are being scored."""
        self._refresh_weights()
        plans, completions = self._sample()
        sampled_s = time.time()
        items = [
            self.query.item(plan.prompt, completion.tokens, completion.stops)
            for plan, completion in zip(plans, completions, strict=True)
        ]
        pending, version = self.scorer.submit(self.query.asked(items)), self.stats.version
        batch = partial(self._scored, plans, completions, pending, version, sampled_s)
        self._in_flight.append(batch)
        if len(self._in_flight) >= self.config.max_in_flight:
            self._store_oldest()

    def flush(self) -> None:
        """Wait for every scoring in flight and store its batch."""
        while self._in_flight:
            self._store_oldest()

    def save(self) -> bytes:
        """All that sampling on needs, but for the policy; waits for the scores in flight."""
        in_flight = []
        for place, finish in enumerate(self._in_flight):
            groups = finish()
            self._in_flight[place] = partial(list, groups)  # or `unscored` were counted again
            in_flight.append(pack_group([pack_group([pack(t) for t in g]) for g in groups]))
        random = [self.rng.bit_generator.state, self.prompts.rng.bit_generator.state]
        return msgpack.packb([json.dumps(random), asdict(self.stats), in_flight])

    def restore(self, data: bytes) -> None:
        """Sample on from the moment of `save`, with weights to be fetched anew."""
        random, stats, in_flight = msgpack.unpackb(data)
        self.rng.bit_generator.state, self.prompts.rng.bit_generator.state = json.loads(random)
        self.stats = ActorStats(**(stats | {"version": -1}))
        for batch in in_flight:
            groups = [list(unpack_group(group)) for group in read_array(batch, max_len=MAX_GROUP)]
            self._in_flight.append(partial(list, groups))

    def _scored(
        self,
        plans: Sequence[GroupPlan],
        completions: Sequence[Completion],
        pending: PendingScores,
        version: int,
        sampled_s: float,
    ) -> list[list[Trajectory]]:
        """The groups of a batch, once it is scored; a plan for each completion.

        Without groups of which a completion has no reward: [0], because a verifier failed on it.
        """
        size = self.config.group_size
        scores = self.query.judged(pending.result(self.config.score_timeout_s))
        scored = zip(plans, completions, scores, strict=True)
        starts = range(0, len(completions), size)
        whole = [all(len(log_reward_S) for log_reward_S in scores[at : at + size]) for at in starts]
        self.stats.unscored += size * whole.count(False)
        found = [
            join(
                plan.prompt,
                completion,
                log_reward_S,
                self.is_correct,
                task=self.task_name,
                actor=self.name,
                policy_version=version,
                behaviour="on_policy" if plan.temperature == 1.0 else "tempered",
                temperature=plan.temperature,
                created_s=sampled_s + number // size * _GROUP_APART_S,
            )
            for number, (plan, completion, log_reward_S) in enumerate(scored)
            if whole[number // size]
        ]
        return [found[at : at + size] for at in range(0, len(found), size)]

    def _pace(self, stop: Callable[[], bool]) -> bool:
        """Wait until the buffer wants more groups; False when stopped instead."""
        started = time.monotonic()
        while (depth := self.buffer.depth()) >= self.config.max_ready_groups:
            waited = time.monotonic() - started
            if stop():
                break
            if waited > self.config.pace_timeout_s:
                raise LearnerStalled(
                    f"{self.name}: the buffer has held {depth} groups that no learner drew for "
                    f"{waited:.0f} s (actors.pace_timeout_s); is the learner alive?"
                )
            time.sleep(_PACE_POLL_S)
        self.stats.paced_s += time.monotonic() - started
        return not stop()

    def _refresh_weights(self) -> None:
        fresh = self.weights.newer_than(self.stats.version)
        if fresh is None:
            return
        if (seen := checksum(fresh.data)) != fresh.checksum:
            raise AdapterMismatch(
                f"{self.name}: weights of version {fresh.version} have checksum {seen}, "
                f"published as {fresh.checksum}; not loaded"
            )
        self.policy.load(fresh.data)
        self.stats.version = fresh.version

    def _sample(self) -> tuple[list[GroupPlan], list[Completion]]:
        """A batch of completions, group by group, and the plan of each."""
        started = time.monotonic()
        prompts = self.prompts.take(self.config.groups_per_batch)
        plans = [
            plan
            for plan in plan_groups(prompts, self.config, self.rng)
            for _ in range(self.config.group_size)
        ]
        completions = self.policy.sample(
            [Request(prompt=plan.prompt.prompt, temperature=plan.temperature) for plan in plans]
        )
        self.stats.tokens += sum(len(completion.tokens) for completion in completions)
        self.stats.sampled += len(completions)
        self.stats.sampling_s += time.monotonic() - started
        return plans, completions

    def _store_oldest(self) -> None:
        started = time.monotonic()
        groups = self._in_flight[0]()
        scored = time.monotonic()
        for group in groups:
            self.buffer.add(group)
        self._in_flight.popleft()
        stored = time.monotonic()
        stats = self.stats
        stats.scoring_wait_s += scored - started
        stats.storing_s += stored - scored
        stats.groups += len(groups)
        for trajectory in (t for group in groups for t in group):
            stats.trajectories += 1
            stats.log_reward_sum += float(trajectory.log_reward[-1])
            stats.gradable += trajectory.correct is not None
            stats.correct += trajectory.correct is True
