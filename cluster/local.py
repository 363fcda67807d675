"""The same run in one process, without Ray: the same classes, wired directly.

Actor and learner take turns, so this run is also the deterministic one: the same seed gives the
same trajectories and the same weights.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import roles
from cluster.board import WeightBoard
from cluster.config import RunConfig
from reward.item import ScoreItem
from reward.replica import RewardReplica


class DirectScorer:
    """Scores in the caller's own thread, when the result is asked for."""

    def __init__(self, replica: RewardReplica) -> None:
        self._replica = replica

    def submit(self, items: Sequence[ScoreItem]) -> "DirectScores":
        """Remember what to score."""
        return DirectScores(self._replica, list(items))


class DirectScores:
    """A scoring that has not begun."""

    def __init__(self, replica: RewardReplica, items: list[ScoreItem]) -> None:
        self._replica = replica
        self._items = items

    def result(self, timeout_s: float) -> list[NDArray[np.float32]]:
        """Log-rewards [S] in nats for each item."""
        return self._replica.score(self._items)


class LocalRun:
    """One actor, one reward rank and one learner rank, stepped by the driver.

    Raises:
        ValueError: the configuration asks for several ranks, which one process cannot be.
    """

    def __init__(
        self, config: RunConfig, *, run: str, run_dir: str, buffer_url: str, buffer_password: str
    ) -> None:
        if config.reward.ranks > 1 or config.learner.ranks > 1:
            raise ValueError(
                f"--local is one process, but reward.ranks = {config.reward.ranks} and "
                f"learner.ranks = {config.learner.ranks}; set both to 1 or leave --local out"
            )
        self._config = config
        board = WeightBoard()
        address, port = roles.own_rendezvous()
        self._replica = roles.build_replica(
            config,
            name="reward-0",
            rank=roles.build_reward_rank(config, rank=0, world_size=1, address=address, port=port),
            peers=[],
        )
        scorer = DirectScorer(self._replica)
        self._buffer = roles.build_buffer(config, run, buffer_url, buffer_password)
        self._learner = roles.build_learner(
            config,
            run_dir=run_dir,
            rank=0,
            world_size=1,
            address=address,
            port=port,
            buffer=self._buffer,
            weights=board,
        )
        self._actor = roles.build_actor(
            config,
            name="actor-0",
            seed=(config.seed, 0, self._learner.version),
            buffer=self._buffer,
            scorer=scorer,
            weights=board,
        )
        roles.seed_buffer(config, scorer=scorer, buffer=self._buffer)
        self.learner_rows: list[dict[str, float]] = []
        self.restarts = 0

    @property
    def running(self) -> bool:
        """Always: the constructor has brought everything up."""
        return True

    @property
    def finished(self) -> bool:
        """Whether the learner has done its steps."""
        return self._learner.completed_steps >= self._config.learner.steps

    @property
    def learner_status(self) -> dict[str, Any]:
        """Step and version of the learner."""
        return {"step": self._learner.completed_steps, "version": self._learner.version}

    def tick(self) -> None:
        """Roll out until the learner has its groups, then take one step."""
        while self._buffer.depth() < self._config.learner.groups_per_step:
            self._actor.step()
        self.learner_rows.append(self._learner.step())

    def counts(self) -> dict[str, dict[str, int]]:
        """One actor and one replica, wanted and had."""
        one = {"actors": 1, "replicas": 1}
        return {"desired": one, "actual": one}

    def actor_totals(self) -> dict[str, float]:
        """The actor's counters."""
        return {key: value for key, value in asdict(self._actor.stats).items() if key != "version"}

    def replica_totals(self) -> dict[str, float]:
        """The replica's counters."""
        return {
            key: value
            for key, value in asdict(self._replica.stats()).items()
            if isinstance(value, int | float)
        }

    def stop(self, timeout_s: float) -> list[str]:
        """Store what is in flight and checkpoint; nothing can be left to kill."""
        self._actor.flush()
        self._learner.finish()
        return []
