"""The common life of a run's processes, as a plain class; `launcher` makes Ray actors of them.

`WorkerGroup` drives it: `rendezvous` (say where this process may be reached), `start` (build what
it holds: slow), `run` (work until stopped), and beside them, in another thread, `status` and
`stop`.
"""

import os
import socket
import threading
from dataclasses import dataclass, field

import psutil
import ray
from ray.actor import ActorHandle

from buffer.replay import ReplayBuffer
from cluster.config.schema import RunConfig
from cluster.distributed.clients import RemoteWeightStore
from cluster.distributed.parts import Parts
from cluster.distributed.source_check import check_source
from cluster.run.assembly import build_buffer
from cluster.run.directory import RunDirectory
from cluster.run.session import BufferAddress
from lm.process_group import Rendezvous


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Address and port where the ranks of one worker group meet."""

    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The facts of a run that each of its processes gets."""

    config: RunConfig
    directory: RunDirectory
    namespace: str
    buffer: BufferAddress
    source: str  # fingerprint of what the driver runs
    weight_store: ActorHandle
    replica_registry: ActorHandle
    parts: Parts = field(default_factory=Parts)
    synchronous: bool = False  # actors sample one batch for each published version


class Worker:
    """The part of a process's life that is the same for all."""

    def __init__(self, context: RunContext, *, name: str, rank: int, num_ranks: int) -> None:
        self._context = context
        self._config = with_patience(context.config)
        self._name = name
        self._rank = rank
        self._num_ranks = num_ranks
        self._answer_timeout_s = self._config.cluster.answer_timeout_s
        self._stopping = threading.Event()
        self._reserved: socket.socket | None = None

    def __repr__(self) -> str:
        return self._name if self._num_ranks == 1 else f"{self._name}.rank{self._rank}"

    def rendezvous(self) -> Meeting:
        """Reserve a port of this node until `_meet`, and say where it is.

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
        """Where this rank meets the others; gives the meeting's port up, to listen at once."""
        if self._reserved is not None:
            self._reserved.close()
        return Rendezvous(
            address=meeting.address,
            port=meeting.port,
            rank=self._rank,
            num_ranks=self._num_ranks,
            timeout_s=timeout_s,
        )

    def _weight_store(self) -> RemoteWeightStore:
        return RemoteWeightStore(self._context.weight_store, timeout_s=self._answer_timeout_s)

    def _connect_buffer(self) -> ReplayBuffer:
        context = self._context
        return build_buffer(self._config, run=context.directory.name, place=context.buffer)


def with_patience(config: RunConfig) -> RunConfig:
    """The same run whose parts bear with one another being placed, started and found silent, once.

    Placing and starting may each take `start_timeout_s`; a part, Redis among them, is replaced
    after `silence_timeout_s` without an answer. A part that comes back only at a later try is
    waited for by the supervisor; a part that needs it meanwhile ends in an error that says so, and
    is replaced.
    """
    start_s = 2 * config.cluster.start_timeout_s
    silence_s = config.cluster.silence_timeout_s
    waits = {
        "actors.score_timeout_s": config.actors.score_timeout_s,
        "actors.pace_timeout_s": config.actors.pace_timeout_s,
        "learner.starvation_timeout_s": config.learner.starvation_timeout_s,
        "learner.collective_timeout_s": config.learner.collective_timeout_s,
    }
    answers = {
        "buffer.timeout_s": config.buffer.timeout_s,
        "cluster.answer_timeout_s": config.cluster.answer_timeout_s,
    }
    return config.changed(
        {key: wait_s + start_s for key, wait_s in waits.items()}
        | {key: wait_s + silence_s for key, wait_s in answers.items()}
    )


def pin_interface(address: str) -> None:
    """Have gloo and NCCL use the network interface that has `address`.

    Left alone, gloo asks for the address of the host's name, which is often loopback, and NCCL
    takes the first interface it likes, which may be a container's. What the environment names
    already, stands.

    Args:
        address: under which Ray knows this node.
    """
    if (name := interface_of(address)) is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # else NCCL takes it for a prefix


def interface_of(address: str) -> str | None:
    """Name of the interface that has a numeric address; None if no interface has."""
    for name, assigned in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in assigned):
            return name
    return None
