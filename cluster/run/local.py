"""The same run in one process, without Ray: the same classes, wired directly.

Actor and learner take turns, so the same seed gives the same trajectories and the same weights.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import Any

from actors.actor import RolloutActor
from buffer.replay import BufferStarved, DrawRequest, Group, ReplayBuffer
from buffer.trajectory import Trajectory
from cluster.config.schema import RunConfig
from cluster.run import assembly
from cluster.run.directory import RunDirectory
from cluster.run.evaluation import evaluate
from cluster.run.session import BufferAddress
from cluster.run.weight_store import WeightStore
from learner.engine import TorchEngine
from learner.learner import StoppedWaiting
from lm.model import load_base
from reward.lockstep import UnshardedRank
from reward.replica import RewardReplica
from tasks.evaluation.evaluation import Evaluation


class RollingReplay:
    """The buffer of a run in one process: where the learner would wait, somebody rolls out."""

    def __init__(self, buffer: ReplayBuffer, roll_out: Callable[[], None]) -> None:
        self._buffer = buffer
        self._roll_out = roll_out

    def draw(self, request: DrawRequest) -> list[Group]:
        """See `ReplayBuffer.draw`."""
        deadline_s = monotonic() + request.timeout_s
        while True:
            try:
                return self._buffer.draw(replace(request, timeout_s=0.0))
            except BufferStarved:
                if request.stop():
                    return []
                if monotonic() >= deadline_s:
                    raise
                self._roll_out()

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """See `ReplayBuffer.discard`."""
        self._buffer.discard(trajectories)


class LocalRun:
    """One actor, one reward rank and one learner rank, stepped by the driver.

    Where the learner imitates, the learner alone.

    Args:
        stop: ends a wait for groups.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        directory: RunDirectory,
        buffer: BufferAddress,
        report: Callable[[str], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._stop = stop
        self._damaged = False
        self._groups_per_step = config.learner.groups_per_step
        self._adapter = directory.adapter
        self._base, task = assembly.load_task(config)
        store = WeightStore()
        self._buffer = assembly.build_buffer(
            config, run=directory.name, url=buffer.url, password=buffer.password
        )
        self._learner = assembly.build_learner(
            config,
            base=self._base,
            task=task,
            directory=directory,
            make_engine=TorchEngine,
            buffer=RollingReplay(self._buffer, self._roll_out),
            weights=store,
            warn=report,
        )
        self._replica: RewardReplica | None = None
        self._actor: RolloutActor | None = None
        if config.rollout_actors:
            self._replica = RewardReplica(
                UnshardedRank(load_base(config.lm).model), [], config.reward, name="reward-0"
            )
            self._actor = assembly.build_actor(
                config,
                policy=assembly.model_policy(config, load_base(config.lm), task),
                task=task,
                name="actor-0",
                seed=(config.seed, 0, self._learner.version),
                buffer=self._buffer,
                scorer=self._replica,
                weights=store,
            )
            assembly.seed_buffer(config, task=task, scorer=self._replica, buffer=self._buffer)
        self._learner.publish()
        self.learner_rows: list[dict[str, float]] = []
        self._deepest, self._progressed_s = 0, monotonic()

    @property
    def finished(self) -> bool:
        """Whether the learner has done its steps."""
        return self._learner.completed_steps >= self._config.learner.steps

    @property
    def learner_status(self) -> dict[str, Any]:
        """Step and version of the learner."""
        return {"step": self._learner.completed_steps, "version": self._learner.version}

    def tick(self) -> None:
        """Roll out once while the learner lacks groups, else take one step.

        Groups that are too old or wrong to be drawn are made up for during the step.

        Raises:
            BufferStarved: the groups in the buffer have not become more for
                `learner.starvation_timeout_s`.
        """
        if self._actor is not None and (depth := self._buffer.depth()) < self._groups_per_step:
            self._check_progress(depth)
            self._roll_out()
            return
        self._damaged = True
        with suppress(StoppedWaiting):
            self.learner_rows.append(self._learner.step(self._stop))
        self._damaged = False
        self._deepest, self._progressed_s = 0, monotonic()

    def counts(self) -> dict[str, dict[str, int]]:
        """One actor and one replica, wanted and had; none of either for demonstrations."""
        number = 0 if self._actor is None else 1
        parts = {"actors": number, "replicas": number}
        return {"desired": parts, "actual": parts}

    def actor_totals(self) -> dict[str, float]:
        """The actor's counters."""
        stats = {} if self._actor is None else asdict(self._actor.stats)
        return {key: value for key, value in stats.items() if key != "version"}

    def stop(self, timeout_s: float) -> list[str]:
        """Store what is in flight and checkpoint; nothing can be left to kill.

        After an error in a step the last checkpoint stays the newest, and the adapter as it was.
        """
        if self._actor is not None:
            self._actor.flush()
        if not self._damaged:
            self._learner.checkpoint()
            assembly.save_result(self._config, self._learner, self._base, self._adapter)
        if self._replica is not None:
            self._replica.close(timeout_s)
        return []

    def _check_progress(self, depth: int) -> None:
        if depth > self._deepest:
            self._deepest, self._progressed_s = depth, monotonic()
        limit_s = self._config.learner.starvation_timeout_s
        if monotonic() - self._progressed_s > limit_s:
            raise BufferStarved(
                f"the buffer has held at most {self._deepest} groups for {limit_s:.0f} s "
                f"(learner.starvation_timeout_s), and a step needs "
                f"learner.groups_per_step = {self._groups_per_step}: lower it, or raise "
                f"buffer.fresh_capacity, buffer.max_age or buffer.max_draws"
            )

    def _roll_out(self) -> None:
        if self._actor is not None:
            self._actor.step()


class LocalSession:
    """Everything in this process."""

    address = ""

    def __init__(self, config: RunConfig, directory: RunDirectory, buffer: BufferAddress) -> None:
        self._config = config
        self._directory = directory
        self._buffer = buffer

    def open(self) -> None:
        """Nothing is needed."""

    def start(self, report: Callable[[str], None], stop: Callable[[], bool]) -> LocalRun:
        """Build actor, replica and learner, which bear with a Redis that has to be replaced."""
        buffer, cluster = self._config.buffer, self._config.cluster
        reply_s = buffer.timeout_s + cluster.silence_timeout_s
        return LocalRun(
            self._config.changed({"buffer.timeout_s": reply_s}),
            directory=self._directory,
            buffer=self._buffer,
            report=report,
            stop=stop,
        )

    def evaluate(self, adapter: Path | None, report: Callable[[str], None]) -> "Future[Evaluation]":
        """Measure now."""
        pending: Future[Evaluation] = Future()
        pending.set_result(evaluate(self._config, adapter=adapter))
        return pending

    def close(self) -> None:
        """Nothing is left."""
