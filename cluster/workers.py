"""The processes of a distributed run, as plain classes; `launch` makes Ray actors of them.

Each has the same life, which `gang` drives: `rendezvous` (where the process may be reached),
`start` (build what it holds: slow), `run` (work until stopped), and beside them, in another
thread, `status` and `stop`.
"""

import os
import socket
import threading
from dataclasses import asdict, dataclass
from typing import Any

import ray
from cluster import roles
from cluster.config import RunConfig
from cluster.remote import RemoteBoard, RemoteScorer
from ray.actor import ActorHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one gang meet."""

    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What every process of a run is told."""

    config: RunConfig
    run: str
    run_dir: str
    namespace: str
    buffer_url: str
    buffer_password: str
    board: ActorHandle


class Worker:
    """The part of a process's life that is the same for all."""

    def __init__(self, context: RunContext, *, name: str, rank: int, world_size: int) -> None:
        self._context = context
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._stopping = threading.Event()

    def __repr__(self) -> str:
        return self._name if self._world_size == 1 else f"{self._name}.{self._rank}"

    def rendezvous(self) -> Rendezvous:
        """An address of this node and a port that is free on it now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return Rendezvous(
                address=ray.util.get_node_ip_address(), port=probe.getsockname()[1]
            )

    def stop(self) -> None:
        """Ask `run` to end; it finishes what it holds first."""
        self._stopping.set()

    def pid(self) -> int:
        """Process id on its node."""
        return os.getpid()

    def _board(self) -> RemoteBoard:
        return RemoteBoard(
            self._context.board, timeout_s=self._context.config.cluster.answer_timeout_s
        )


class RolloutWorker(Worker):
    """One rollout actor."""

    def __init__(self, context: RunContext, *, name: str, index: int, incarnation: int) -> None:
        super().__init__(context, name=name, rank=0, world_size=1)
        self._index = index
        self._incarnation = incarnation

    def start(self, _: Rendezvous) -> None:
        """Load LM and task, connect to the buffer; seed it, if this is the first actor."""
        context = self._context
        scorer = RemoteScorer(
            self._board(),
            namespace=context.namespace,
            attempt_s=context.config.reward.deadline_s,
            first=self._index,
        )
        self._actor = roles.build_actor(
            context.config,
            name=self._name,
            seed=(context.config.seed, self._index, self._incarnation),
            buffer=roles.build_buffer(
                context.config, context.run, context.buffer_url, context.buffer_password
            ),
            scorer=scorer,
            weights=self._board(),
        )

    def run(self) -> dict[str, Any]:
        """Roll out until stopped; the final counters."""
        if self._index == 0:
            self._actor.seed()
        self._actor.run(self._stopping.is_set)
        return self.status()

    def status(self) -> dict[str, Any]:
        """The actor's counters."""
        return asdict(self._actor.stats)


class RewardWorker(Worker):
    """One rank of a reward replica; rank 0 answers the actors and leads the others."""

    def __init__(
        self,
        context: RunContext,
        *,
        name: str,
        rank: int,
        world_size: int,
        peers: tuple[ActorHandle, ...] = (),
    ) -> None:
        super().__init__(context, name=name, rank=rank, world_size=world_size)
        self._peers = peers

    def start(self, meeting: Rendezvous) -> None:
        """Join the other ranks and take this rank's shard of the frozen LM."""
        self._rank_of_lm = roles.build_reward_rank(
            self._context.config,
            rank=self._rank,
            world_size=self._world_size,
            address=meeting.address,
            port=meeting.port,
        )
        if self._rank == 0:
            self._replica = roles.build_replica(
                self._context.config,
                name=self._name,
                rank=self._rank_of_lm,
                peers=[RemotePeer(handle) for handle in self._peers],
            )

    def score(self, items: list[Any]) -> list[Any]:
        """Log-rewards of the items (rank 0 only)."""
        return self._replica.score(items)

    def forward(self, share: Any) -> Any:
        """This rank's part of one scoring (ranks above 0)."""
        return self._rank_of_lm.forward(share)

    def run(self) -> dict[str, Any]:
        """Serve until stopped or broken."""
        while not self._stopping.wait(timeout=0.5):
            if self._rank == 0 and not self._replica.healthy():
                raise RuntimeError(f"{self!r}: a rank failed; the replica must be rebuilt")
        return self.status()

    def status(self) -> dict[str, Any]:
        """The replica's counters; nothing on ranks above 0."""
        return asdict(self._replica.stats()) if self._rank == 0 else {}


class RemotePeer:
    """A rank above 0, as rank 0's replica sees it."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def forward(self, share: Any) -> "RemoteShare":
        """Start the peer's part; returns at once."""
        return RemoteShare(self._handle.forward.remote(share))


class RemoteShare:
    """A peer's part under way."""

    def __init__(self, ref: "ray.ObjectRef[Any]") -> None:
        self._ref = ref

    def result(self, timeout_s: float) -> Any:
        """What the peer computed; raises as Ray does."""
        return ray.get(self._ref, timeout=timeout_s)


class LearnerWorker(Worker):
    """One rank of the learner; rank 0 draws, publishes, checkpoints and reports."""

    def start(self, meeting: Rendezvous) -> None:
        """Build policy and engine, join the other ranks, go back to the last checkpoint if any."""
        context = self._context
        self._rows: list[dict[str, float]] = []
        self._learner = roles.build_learner(
            context.config,
            run_dir=context.run_dir,
            rank=self._rank,
            world_size=self._world_size,
            address=meeting.address,
            port=meeting.port,
            buffer=roles.build_buffer(
                context.config, context.run, context.buffer_url, context.buffer_password
            ),
            weights=self._board(),
        )

    def run(self) -> dict[str, Any]:
        """Learn until the configured steps are done or until stopped; checkpoints at the end."""
        self._learner.run(self._stopping.is_set, self._rows.append)
        return self.status()

    def status(self) -> dict[str, Any]:
        """Step, version and step count asked for."""
        return {
            "step": self._learner.completed_steps,
            "version": self._learner.version,
            "rows": len(self._rows),
        }

    def rows_since(self, count: int) -> list[dict[str, float]]:
        """Metrics of the steps after the first `count` of this process."""
        return self._rows[count:]


class EvaluationWorker(Worker):
    """Evaluates the policy on the task's test data, before training and after."""

    def __init__(self, context: RunContext, *, name: str) -> None:
        super().__init__(context, name=name, rank=0, world_size=1)

    def evaluate(self, adapter: str | None) -> dict[str, Any]:
        """Scores of the base (`adapter` None) or of the adapter in a folder, as plain data."""
        return roles.evaluate(self._context.config, adapter=adapter)
