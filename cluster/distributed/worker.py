"""The processes of a distributed run, as plain classes; `launch` makes Ray actors of them.

Each has the same life, which `gang` drives: `rendezvous` (where the process may be reached),
`start` (build what it holds: slow), `run` (work until stopped), and beside them, in another
thread, `status` and `stop`.
"""

import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from torch import nn

from actors.protocols import TrajectorySink
from actors.turns import TakingTurns
from cluster.config.schema import RunConfig
from cluster.distributed.clients import NobodyScores, RemoteBoard, RemotePeer, RemoteScorer
from cluster.distributed.held_calls import HeldCalls
from cluster.distributed.network_interface import pin_interface
from cluster.distributed.parts import Parts
from cluster.distributed.rollout_log import LoggedSink
from cluster.distributed.source_check import check_source
from cluster.run import assembly as roles
from cluster.run.directory import check_shared
from learner.config import LearnerConfig
from learner.engine import Engine
from lm.process_group import Rendezvous
from reward.replica import RewardReplica

_log = logging.getLogger(__name__)
_HEALTH_POLL_S = 0.5
# A caller that has read the roster just before a replica was withdrawn calls within this time.
_QUIET_S = 0.5
_LAST_CALLS_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ranks of one gang meet."""

    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What every process of a run is told."""

    config: RunConfig
    run: str
    checkpoints: Path
    adapter: Path
    quarantine: Path
    namespace: str
    buffer_url: str
    buffer_password: str | None
    source: str  # fingerprint of what the driver runs
    board: ActorHandle
    parts: Parts = field(default_factory=Parts)
    synchronous: bool = False  # actors sample one batch for each published version


class Worker:
    """The part of a process's life that is the same for all."""

    def __init__(self, context: RunContext, *, name: str, rank: int, num_ranks: int) -> None:
        self._context = context
        self._name = name
        self._rank = rank
        self._num_ranks = num_ranks
        self._stopping = threading.Event()
        self._reserved: socket.socket | None = None

    def __repr__(self) -> str:
        return self._name if self._num_ranks == 1 else f"{self._name}.rank{self._rank}"

    def rendezvous(self) -> Meeting:
        """An address of this node and a port on it, which nobody else gets until `_meet`.

        Loading a model takes long, and on a busy node a port that is merely free now is soon
        another process's.
        """
        self._reserved = socket.socket()
        self._reserved.bind(("", 0))
        port = self._reserved.getsockname()[1]
        return Meeting(address=ray.util.get_node_ip_address(), port=port)

    def start(self, meeting: Meeting) -> None:
        """Take part in the run: build what this process holds, and join the other ranks.

        Raises:
            SourceMixture: this process runs other source than the driver.
        """
        self._node = ray.util.get_node_ip_address()
        check_source(self._context.source, node=self._node)
        pin_interface(self._node)
        self._build(meeting)

    def stop(self) -> None:
        """Ask `run` to end; it finishes what it holds first."""
        self._stopping.set()

    def _build(self, meeting: Meeting) -> None:
        raise NotImplementedError

    def _meet(self, meeting: Meeting, timeout_s: float) -> Rendezvous:
        """This rank's place among the others; gives the meeting's port up, to listen at once."""
        if self._reserved is not None:
            self._reserved.close()
        return Rendezvous(
            address=meeting.address,
            port=meeting.port,
            rank=self._rank,
            num_ranks=self._num_ranks,
            timeout_s=timeout_s,
        )

    def _board(self) -> RemoteBoard:
        return RemoteBoard(
            self._context.board, timeout_s=self._context.config.cluster.answer_timeout_s
        )


class RolloutWorker(Worker):
    """One rollout actor."""

    def __init__(self, context: RunContext, *, name: str, index: int, incarnation: int) -> None:
        super().__init__(context, name=name, rank=0, num_ranks=1)
        self._index = index
        self._incarnation = incarnation

    def _build(self, _: Meeting) -> None:
        """Load LM and task, connect to the buffer."""
        context = self._context
        parts = context.parts.rollout(context.config)
        self._task = parts.task
        self._buffer = roles.build_buffer(
            context.config,
            run=context.run,
            url=context.buffer_url,
            password=context.buffer_password,
        )
        sink: TrajectorySink = self._buffer
        if parts.decode is not None:
            sink = LoggedSink(self._buffer, parts.decode)
        self._scorer = RemoteScorer(
            self._board(),
            namespace=context.namespace,
            attempt_s=context.config.reward.deadline_s,
            handover_s=context.config.actors.score_timeout_s,
            stop=self._stopping.is_set,
            first=self._index,
        )
        self._actor = roles.build_actor(
            context.config,
            policy=parts.policy,
            task=self._task,
            name=self._name,
            seed=(context.config.seed, self._index, self._incarnation),
            buffer=sink,
            scorer=self._scorer,
            weights=TakingTurns(self._board(), self._stopping.is_set)
            if context.synchronous
            else self._board(),
        )

    def run(self) -> dict[str, Any]:
        """Roll out until stopped; the final counters. The first actor seeds the buffer before.

        Rollouts that nobody scores any more end with the run: nobody was told of them.
        """
        try:
            if self._index == 0:
                roles.seed_buffer(
                    self._context.config, task=self._task, scorer=self._scorer, buffer=self._buffer
                )
            self._actor.run(self._stopping.is_set)
        except NobodyScores as error:
            _log.warning("%s: rollouts in flight were not stored: %s", self._name, error)
        return self.status()

    def status(self) -> dict[str, Any]:
        """The actor's counters."""
        return asdict(self._actor.stats) | {"scoring_retries": self._scorer.retries}


class RewardWorker(Worker):
    """One rank of a reward replica; rank 0 answers the actors and leads the others."""

    def __init__(
        self,
        context: RunContext,
        *,
        name: str,
        rank: int,
        num_ranks: int,
        peers: tuple[ActorHandle, ...] = (),
    ) -> None:
        super().__init__(context, name=name, rank=rank, num_ranks=num_ranks)
        self._peers = peers
        self._calls = HeldCalls()

    def _build(self, meeting: Meeting) -> None:
        """Join the other ranks and take this rank's shard of the frozen LM."""
        config = self._context.config

        self._shard = self._context.parts.reward_rank(
            config, lambda: self._meet(meeting, config.reward.deadline_s)
        )
        if self._rank == 0:
            peers = [RemotePeer(handle) for handle in self._peers]
            self._replica = RewardReplica(self._shard, peers, config.reward, name=self._name)

    def score(self, items: list[Any]) -> list[Any]:
        """Log-rewards of the items (rank 0 only)."""
        with self._calls.one():
            return self._replica.score(items)

    def forward(self, share: Sequence[Any]) -> list[Any]:
        """This rank's part of one scoring (ranks above 0)."""
        return self._shard.forward(share)

    def run(self) -> dict[str, Any]:
        """Serve until stopped and no call is held or comes any more.

        Raises:
            RuntimeError: the ranks are out of step; the replica must be built anew.
        """
        while not self._stopping.wait(timeout=_HEALTH_POLL_S):
            self._check_health()
        asked_s = time.monotonic()
        while min(self._calls.quiet_s(), time.monotonic() - asked_s) < _QUIET_S:
            self._check_health()
            time.sleep(_LAST_CALLS_POLL_S)
        return self.status()

    def _check_health(self) -> None:
        if self._rank == 0 and not self._replica.healthy():
            raise RuntimeError("a pass over the ranks failed or outlasted its deadline")

    def status(self) -> dict[str, Any]:
        """The replica's counters; nothing on ranks above 0."""
        return asdict(self._replica.stats()) if self._rank == 0 else {}


class LearnerWorker(Worker):
    """One rank of the learner; rank 0 draws, publishes, checkpoints and reports."""

    def _build(self, meeting: Meeting) -> None:
        """Build policy and engine, join the other ranks, go back to the last checkpoint if any."""
        context, config = self._context, self._context.config
        check_shared(context.adapter.parent, node=self._node)
        self._rows: list[dict[str, float]] = []
        self._waited_s = 0.0
        self._events: list[str] = []
        self._base, task = context.parts.learner_base(config)

        def make_engine(model: nn.Module, settings: LearnerConfig) -> Engine:
            place = self._meet(meeting, settings.collective_timeout_s)
            return context.parts.engine(config, model, settings, place)

        self._buffer = roles.build_buffer(
            config, run=context.run, url=context.buffer_url, password=context.buffer_password
        )
        self._learner = roles.build_learner(
            config,
            base=self._base,
            task=task,
            checkpoints=context.checkpoints,
            quarantine=context.quarantine,
            make_engine=make_engine,
            buffer=self._buffer,
            weights=self._board(),
            warn=self._warn,
            gated=context.parts.gated,
        )

    def run(self) -> dict[str, Any]:
        """Learn until the configured steps are done or until stopped; then leave the adapter."""
        self._learner.run(self._context.config.learner.steps, self._stopping.is_set, self._keep_row)
        if self._rank == 0:
            roles.save_result(
                self._context.config, self._learner, self._base, self._context.adapter
            )
        return self.status()

    def status(self) -> dict[str, Any]:
        """Steps taken, version published, and how many rows and events can be read."""
        return {
            "step": self._learner.completed_steps,
            "version": self._learner.version,
            "rows": len(self._rows),
            "events": len(self._events),
        }

    def rows_since(self, count: int) -> list[dict[str, float]]:
        """Metrics of the steps after the first `count` of this process."""
        return self._rows[count:]

    def events_since(self, count: int) -> list[str]:
        """What people should know, after the first `count` lines of this process."""
        return self._events[count:]

    def _keep_row(self, row: dict[str, float]) -> None:
        waited_s = self._buffer.waited_s
        self._rows.append(row | {"time/draw_wait_s": waited_s - self._waited_s})
        self._waited_s = waited_s

    def _warn(self, text: str) -> None:
        _log.warning(text)
        self._events.append(text)
