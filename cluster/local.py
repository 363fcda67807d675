"""The same run in one process, without Ray: the same classes, wired directly.

Actor and learner take turns, so the same seed gives the same trajectories and the same weights.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import roles
from cluster.board import WeightBoard
from cluster.config import RunConfig
from learner.engine import TorchEngine
from lm.adapter import save_adapter
from lm.model import load_base
from reward.replica import RewardReplica
from reward.whole import WholeRank


class LocalRun:
    """One actor, one reward rank and one learner rank, stepped by the driver."""

    def __init__(
        self,
        config: RunConfig,
        *,
        run: str,
        checkpoints: Path,
        adapter: Path,
        buffer_url: str,
        buffer_password: str | None,
    ) -> None:
        self._config = config
        self._adapter = adapter
        self._base, task = roles.load_task(config)
        board = WeightBoard()
        scorer = RewardReplica(
            WholeRank(load_base(config.lm).model), [], config.reward, name="reward-0"
        )
        self._replica = scorer
        self._buffer = roles.build_buffer(config, run=run, url=buffer_url, password=buffer_password)
        self._learner = roles.build_learner(
            config,
            base=self._base,
            task=task,
            checkpoints=checkpoints,
            make_engine=TorchEngine,
            buffer=self._buffer,
            weights=board,
        )
        self._actor = roles.build_actor(
            config,
            base=load_base(config.lm),
            task=task,
            name="actor-0",
            seed=(config.seed, 0, self._learner.version),
            buffer=self._buffer,
            scorer=scorer,
            weights=board,
        )
        roles.seed_buffer(config, task=task, scorer=scorer, buffer=self._buffer)
        self._learner.publish()
        self.learner_rows: list[dict[str, float]] = []

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

    def stop(self, timeout_s: float) -> list[str]:
        """Store what is in flight and checkpoint; nothing can be left to kill."""
        self._actor.flush()
        self._learner.checkpoint()
        save_adapter(self._learner.model, self._adapter, self._base.fingerprint)
        self._replica.close(timeout_s)
        return []
