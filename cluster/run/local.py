"""The same run in one process, without Ray: the same classes, wired directly.

Actor and learner take turns, so the same seed gives the same trajectories and the same weights.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import msgpack
import torch

from actors.actor import RolloutActor
from actors.engine import NativeEngine
from actors.protocols import RolloutEngine
from buffer.replay import BufferStarved, DrawRequest, Group, ReplayBuffer
from buffer.trajectory import Trajectory
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.run import assembly
from cluster.run.directory import RunDirectory
from cluster.run.evaluation import evaluate
from cluster.run.session import BufferAddress
from cluster.run.weight_store import WeightStore
from learner.engine import TorchEngine
from learner.learner import StoppedWaiting
from lm.model import LanguageModel
from reward.lockstep import UnshardedRank
from reward.replica import RewardReplica
from tasks.evaluation.evaluation import Evaluation
from tasks.registry import build_task
from tasks.task import Task

NO_CACHE = {"reward.cache_items": 0}


@dataclass
class RollingReplay:
    """The buffer of a run in one process: where the learner would wait, somebody rolls out."""

    buffer: ReplayBuffer
    roll_out: Callable[[], None]

    def draw(self, request: DrawRequest) -> list[Group]:
        deadline_s = monotonic() + request.timeout_s
        while True:
            try:
                return self.buffer.draw(replace(request, timeout_s=0.0))
            except BufferStarved:
                if request.stop():
                    return []
                if monotonic() >= deadline_s:
                    raise
                self.roll_out()

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        self.buffer.discard(trajectories)


class LocalRun:
    """One actor, one reward rank and one learner rank, stepped by the driver.

    Where the learner imitates, the learner alone. With the buffer in memory, each checkpoint holds
    the whole run, and whoever resumes it goes on bit for bit as if it had not been killed.

    Args:
        stop: ends a wait for groups.
        base: where this process has it, whose layers are left as they are; None: it is loaded.
    """

    settled = True
    given_up = ""

    def __init__(
        self,
        config: RunConfig,
        *,
        directory: RunDirectory,
        buffer: BufferAddress,
        report: Callable[[str], None],
        stop: Callable[[], bool] = lambda: False,
        base: LanguageModel | None = None,
    ) -> None:
        self._config = config
        self._stop = stop
        self._damaged = False
        self._groups_per_step = config.learner.groups_per_step
        self._adapter = directory.adapter
        untouched = base or assembly.shared_model(config).base
        task = build_task(config.task, untouched.tokenizer, seed=config.seed)
        self._base = twin(untouched)  # of the learner, which puts its adapter into it
        self._weights = WeightStore[bytes]()
        self._memory = buffer.memory
        self._buffer = assembly.build_buffer(config, run=directory.name, place=buffer)
        self._replica: RewardReplica | None = None
        self._actor: RolloutActor | None = None
        self._policy: NativeEngine | None = None
        self._saved: dict[str, Any] = {}
        self._learner = assembly.build_learner(
            config,
            base=self._base,
            task=task,
            directory=directory,
            make_engine=TorchEngine,
            buffer=RollingReplay(self._buffer, self._roll_out),
            weights=self._weights,
            warn=report,
            companion=None if self._memory is None else self,
        )
        if config.rollout_actors:
            self._begin_rollouts(task, twin(untouched))
        self._go_on()
        self.learner_rows: list[dict[str, float]] = []
        self._deepest, self._progressed_s = 0, monotonic()

    def _begin_rollouts(self, task: Task, base: LanguageModel) -> None:
        """Bring up reward replica and actor; the demonstrations go into the buffer."""
        config = self._config
        # A remembered score was rounded with others than it would be with now.
        scoring = config.reward if self._memory is None else config.changed(NO_CACHE).reward
        self._replica = RewardReplica(UnshardedRank(base.model), [], scoring, name="reward-0")
        policy: Callable[[int], RolloutEngine]
        if config.actors.engine == "vllm":
            policy = assembly.vllm_policy(config, task)
        else:
            changes_weights = base.model.dtype == torch.float32  # see `NativeEngine`
            own = twin(base, own_weights=changes_weights)
            policy = assembly.model_policy(config, own, task)
        self._actor = assembly.build_actor(
            config,
            policy=policy,
            task=task,
            name="actor-0",
            seed=(config.seed, 0, self._learner.version),
            buffer=self._buffer,
            scorer=self._replica,
            weights=self._weights,
        )
        if isinstance(engine := self._actor.policy, NativeEngine):
            self._policy = engine
        if not self._saved:
            assembly.seed_buffer(
                config,
                task=task,
                scorer=self._replica,
                buffer=self._buffer,
                policy=self._actor.policy,
            )

    def save(self) -> bytes:
        """The run but for the learner, with the buffer in memory; see `Companion.save`."""
        published = self._weights.newer_than(-1)
        parts = {
            "buffer": None if self._memory is None else self._memory.save(),
            "gate": self._learner.gate and self._learner.gate.save(),
            "weights": published and [published.version, published.data, published.checksum],
            "actor": self._actor and self._actor.save(),
            "policy": self._policy and self._policy.random_state,
            "torch": torch.get_rng_state().numpy().tobytes(),
        }
        data: bytes = msgpack.packb(parts)
        return data

    def restore(self, data: bytes) -> None:
        """See `Companion.restore`; called while the parts are being built."""
        self._saved = msgpack.unpackb(data)

    def _go_on(self) -> None:
        """Give every part what was saved of it; publish where nothing was."""
        saved = {name: part for name, part in self._saved.items() if part is not None}
        if self._memory is not None and "buffer" in saved:
            self._memory.restore(saved["buffer"])
        if self._learner.gate is not None and "gate" in saved:
            self._learner.gate.restore(saved["gate"])
        if self._actor is not None and self._policy is not None and "actor" in saved:
            self._actor.restore(saved["actor"])
            self._policy.random_state = saved["policy"]
        # Measuring the base, and building the parts, may have drawn from it or not.
        torch.manual_seed(self._config.seed)
        if "torch" in saved:
            torch.set_rng_state(torch.frombuffer(bytearray(saved["torch"]), dtype=torch.uint8))
        if "weights" in saved:
            version, weights, checksum = saved["weights"]
            self._weights.publish(weights, version=version, checksum=checksum)
        else:
            self._learner.publish()

    @property
    def finished(self) -> bool:
        return self._learner.completed_steps >= self._config.learner.steps

    @property
    def learner_status(self) -> dict[str, Any]:
        return {"step": self._learner.completed_steps, "version": self._learner.version}

    def tick(self) -> None:
        """Roll out once while the learner lacks groups, else take one step.

        Groups that are too old or wrong to be drawn are made up for during the step. Raises
        BufferStarved where they have not become more for `learner.starvation_timeout_s`.
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
        self._learner.checkpoint_when_due()

    def scale(self, *, actors: int | None = None, replicas: int | None = None) -> None:
        """Raise UserError: nothing can."""
        raise UserError(
            "this run is one process (--local) with one actor and one replica: stop it, and go on "
            "over Ray with --resume and without --local"
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """One actor and one replica, wanted and had; none of either where the learner imitates."""
        parts = dict.fromkeys(("actors", "replicas"), int(self._actor is not None))
        return {"desired": parts, "actual": parts}

    def actor_totals(self) -> dict[str, float]:
        return {} if self._actor is None else asdict(self._actor.stats)

    def record_metrics(self, learner: object, buffer: object) -> None:
        """Nobody collects them: there is no Ray."""

    def stop(self, timeout_s: float) -> list[str]:
        """Store what is in flight and checkpoint; nothing can be left to kill.

        After an error in a step the last checkpoint stays the newest, and the adapter as it was.
        """
        if self._actor is not None and self._memory is None:
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


@dataclass
class LocalSession:
    """Everything in this process, which loads the base once."""

    config: RunConfig
    directory: RunDirectory
    buffer: BufferAddress
    address: str = ""
    in_process = True

    def __post_init__(self) -> None:
        self._language_model = assembly.shared_model(self.config)

    def open(self) -> None:
        """Nothing is needed."""

    def start(self, report: Callable[[str], None], stop: Callable[[], bool]) -> LocalRun:
        """Build actor, replica and learner, which bear with a Redis that has to be replaced."""
        reply_s = self.config.buffer.timeout_s + self.config.cluster.silence_timeout_s
        config = self.config.changed({"buffer.timeout_s": reply_s})
        return LocalRun(
            config,
            directory=self.directory,
            buffer=self.buffer,
            report=report,
            stop=stop,
            base=self._language_model.base,
        )

    def evaluate(
        self,
        adapter: Path | None,
        report: Callable[[str], None],
        progress: Callable[[str], None],
        *,
        step: int,
    ) -> "Future[Evaluation]":
        """Measured when it returns; see `Session.evaluate`."""
        pending: Future[Evaluation] = Future()
        found = evaluate(
            self.config,
            adapter=adapter,
            step=step,
            progress=progress,
            language_model=self._language_model,
        )
        pending.set_result(found)
        return pending

    def close(self) -> None:
        """Nothing is left."""


def twin(base: LanguageModel, *, own_weights: bool = False) -> LanguageModel:
    """The same base with layers of its own, on the same weights unless it is to change them.

    It is loaded once. Policy, learner and replica each put layers of their own into it.
    """
    model = base.model
    weights = [] if own_weights else [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(weight): weight for weight in weights}
    return replace(base, model=copy.deepcopy(model, memo))
