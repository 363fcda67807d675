"""The rollout actor: samples with the newest weights, has the samples scored, stores them.

It overlaps: while one batch is being scored, the next is being sampled. A trajectory belongs to
the actor until the buffer has acknowledged it.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import msgpack
import numpy as np

from actors.config import ActorConfig
from actors.prompts import PromptStream
from actors.protocols import PendingScores, Policy, Scorer, TrajectorySink, WeightSource
from actors.reward_query import RewardQuery
from actors.rollout import (
    IsCorrect,
    Rollouts,
    plan_groups,
    requests,
    score_items,
    trajectories,
)
from buffer.trajectory import MAX_GROUP, Trajectory, pack, pack_group, read_array, unpack_group
from lm.adapter import checksum

_log = logging.getLogger(__name__)
_PACE_POLL_S = 0.02

_InFlight = Callable[[], list[list[Trajectory]]]  # waits for the scores of a batch; its groups


class CorruptWeights(ValueError):
    """Published weights do not have the checksum that the learner gave them."""


class LearnerStalled(TimeoutError):
    """The buffer stayed full: nobody draws from it."""


@dataclass(slots=True)
class ActorStats:
    """Counters since the actor started; times in seconds."""

    groups: int = 0
    trajectories: int = 0
    tokens: int = 0
    sampled: int = 0  # trajectories, stored or not yet
    gradable: int = 0  # trajectories whose answer is known to be right or wrong
    correct: int = 0
    log_reward_sum: float = 0.0  # nats, of the final states
    version: int = 0
    sampling_s: float = 0.0
    scoring_wait_s: float = 0.0
    storing_s: float = 0.0
    paced_s: float = 0.0


class RolloutActor:
    """Prompts in, scored trajectories out.

    Args:
        name: who this is, written into every trajectory.
        task_name, query, is_correct: what the task says of its prompts.
        version: policy version of the weights that `policy` holds now.
    """

    def __init__(
        self,
        *,
        name: str,
        task_name: str,
        query: RewardQuery,
        is_correct: IsCorrect,
        prompts: PromptStream,
        policy: Policy,
        scorer: Scorer,
        buffer: TrajectorySink,
        weights: WeightSource,
        config: ActorConfig,
        rng: np.random.Generator,
        version: int = 0,
    ) -> None:
        self.name = name
        self.stats = ActorStats(version=version)
        self._task_name = task_name
        self._query = query
        self._is_correct = is_correct
        self._prompts = prompts
        self._policy = policy
        self._scorer = scorer
        self._buffer = buffer
        self._weights = weights
        self._config = config
        self._rng = rng
        self._in_flight: deque[_InFlight] = deque()  # oldest first

    def run(self, stop: Callable[[], bool]) -> None:
        """Sample, score and store until `stop()`; then finish what is in flight.

        Consumes prompts and weights; produces groups in the buffer. Waits for scores (at most
        `score_timeout_s`) and, while the buffer holds enough, for the learner to draw (at most
        `pace_timeout_s`).
        """
        while not stop():
            if self._pace(stop):
                self.step()
        self.flush()

    def step(self) -> None:
        """Sample one batch; store the oldest batch once `max_in_flight` are being scored."""
        self._refresh_weights()
        rollouts = self._sample()
        pending = self._scorer.submit(score_items(rollouts, self._query))
        self._in_flight.append(partial(self._scored, rollouts, pending))
        if len(self._in_flight) >= self._config.max_in_flight:
            self._store_oldest()

    def flush(self) -> None:
        """Wait for every scoring in flight and store its batch."""
        while self._in_flight:
            self._store_oldest()

    def save(self) -> bytes:
        """All that sampling on needs, but for the policy; waits for the scores in flight."""
        in_flight = [
            pack_group([pack_group([pack(t) for t in group]) for group in finish()])
            for finish in self._in_flight
        ]
        random = [self._rng.bit_generator.state, self._prompts.rng.bit_generator.state]
        stats = asdict(self.stats)
        data: bytes = msgpack.packb([json.dumps(random), stats, in_flight])
        return data

    def restore(self, data: bytes) -> None:
        """Sample on from the moment of `save`, with weights to be fetched anew."""
        random, stats, in_flight = msgpack.unpackb(data)
        self._rng.bit_generator.state, self._prompts.rng.bit_generator.state = json.loads(random)
        self.stats = ActorStats(**(stats | {"version": -1}))
        for batch in in_flight:
            groups = [list(unpack_group(group)) for group in read_array(batch, max_len=MAX_GROUP)]
            self._in_flight.append(partial(list, groups))

    def _scored(self, rollouts: Rollouts, pending: PendingScores) -> list[list[Trajectory]]:
        """The groups of a batch, once it is scored."""
        return trajectories(
            rollouts,
            pending.result(self._config.score_timeout_s),
            task=self._task_name,
            actor=self.name,
            is_correct=self._is_correct,
        )

    def _pace(self, stop: Callable[[], bool]) -> bool:
        """Wait until the buffer wants more groups; False when stopped instead."""
        started = time.monotonic()
        while (depth := self._buffer.depth()) >= self._config.max_ready_groups:
            waited = time.monotonic() - started
            if stop():
                break
            if waited > self._config.pace_timeout_s:
                raise LearnerStalled(
                    f"{self.name}: the buffer has held {depth} groups that no learner drew for "
                    f"{waited:.0f} s (actors.pace_timeout_s); is the learner alive?"
                )
            time.sleep(_PACE_POLL_S)
        self.stats.paced_s += time.monotonic() - started
        return not stop()

    def _refresh_weights(self) -> None:
        fresh = self._weights.newer_than(self.stats.version)
        if fresh is None:
            return
        if (seen := checksum(fresh.data)) != fresh.checksum:
            raise CorruptWeights(
                f"{self.name}: weights of version {fresh.version} have checksum {seen}, "
                f"published as {fresh.checksum}; not loaded"
            )
        self._policy.load(fresh.data)
        self.stats.version = fresh.version

    def _sample(self) -> Rollouts:
        started = time.monotonic()
        size = self._config.group_size
        plans = plan_groups(
            self._prompts.take(self._config.groups_per_batch), self._config, self._rng
        )
        completions = self._policy.sample(requests(plans, size))
        rollouts = Rollouts(
            plans=plans,
            completions=tuple(
                tuple(completions[first : first + size])
                for first in range(0, len(completions), size)
            ),
            policy_version=self.stats.version,
            sampled_s=time.time(),
        )
        self.stats.tokens += rollouts.num_tokens
        self.stats.sampled += len(completions)
        self.stats.sampling_s += time.monotonic() - started
        return rollouts

    def _store_oldest(self) -> None:
        started = time.monotonic()
        groups = self._in_flight[0]()
        scored = time.monotonic()
        for group in groups:
            self._buffer.add(group)
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
