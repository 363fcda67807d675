"""The process of one rollout actor."""

import logging
from dataclasses import asdict
from typing import Any

from actors.protocols import TrajectorySink
from actors.weight_sources import FetchedAhead, TakingTurns, WeightSource
from cluster.distributed.clients import NobodyScores, RemoteRegistry, RemoteScorer
from cluster.distributed.rollout_log import LoggedSink
from cluster.distributed.worker import Meeting, Worker
from cluster.run import assembly

_log = logging.getLogger(__name__)


class RolloutWorker(Worker):
    def _build(self, _: Meeting) -> None:
        context = self._context
        parts = context.parts.rollout(self._config)
        self._task = parts.task
        self._buffer = self._connect_buffer()
        sink: TrajectorySink = self._buffer
        if parts.decode is not None:
            sink = LoggedSink(self._buffer, parts.decode)
        self._scorer = RemoteScorer(
            RemoteRegistry(context.replica_registry, timeout_s=self._answer_timeout_s),
            namespace=context.namespace,
            attempt_s=self._config.reward.deadline_s,
            handover_s=self._config.actors.score_timeout_s,
            stop=self._stopping.is_set,
            turn=self._member.index,
        )
        weights: WeightSource = self._weight_store()
        if context.synchronous:
            weights = TakingTurns(weights, self._stopping.is_set)
        else:
            weights = FetchedAhead(weights)
        self._actor = assembly.build_actor(
            self._config,
            policy=parts.policy,
            task=self._task,
            name=self._member.name,
            seed=(self._config.seed, self._member.index, self._member.incarnation),
            buffer=sink,
            scorer=self._scorer,
            weights=weights,
        )

    def run(self) -> dict[str, Any]:
        """Roll out until stopped; the final counters. The first actor seeds the buffer before.

        Rollouts that no replica scores any more are dropped: they were never acknowledged.
        """
        try:
            if self._member.index == 0:
                assembly.seed_buffer(
                    self._config,
                    task=self._task,
                    scorer=self._scorer,
                    buffer=self._buffer,
                    policy=self._actor.policy,
                )
            self._actor.run(self._stopping.is_set, in_turns=self._context.synchronous)
        except NobodyScores as error:
            _log.warning("%s: rollouts in flight were not stored: %s", self._member.name, error)
        return self.status()

    def status(self) -> dict[str, Any]:
        return asdict(self._actor.stats) | {
            "scoring_retries": self._scorer.retries,
            "verifier_failures": assembly.verifier_failures(self._actor),
        }
