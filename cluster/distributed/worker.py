"""The common life of a run's processes, as a plain class; `launcher` makes Ray actors of them."""

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar, NamedTuple

import psutil
import ray
import torch
from ray.actor import ActorHandle

from buffer.replay import ReplayBuffer
from cluster.config.schema import RunConfig
from cluster.distributed.clients import RemoteWeightStore
from cluster.distributed.parts import Parts
from cluster.distributed.source_check import check_source
from cluster.run.assembly import build_buffer
from cluster.run.directory import RunDirectory
from cluster.run.plan import CUDA_MB
from cluster.run.session import BufferAddress
from lm.process_group import Rendezvous, bytes_moved

HUB_TOKEN = "HF_TOKEN"
CONCURRENCY = 4
_PROGRESS_BYTES = 64 * 2**20


class Meeting(NamedTuple):
    """Where the ranks of one worker group meet."""

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
    # The driver's; travels here, and not in the environment that Ray logs and shows.
    hub_token: str | None = field(default_factory=lambda: os.environ.get(HUB_TOKEN), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of a worker group."""

    name: str  # of the group
    index: int = 0  # of the group among those of its kind
    incarnation: int = 0  # groups of that name that the run had before
    rank: int = 0
    num_ranks: int = 1
    gpus: float = 0.0  # that it claims
    peers: tuple[ActorHandle, ...] = ()  # the ranks above this one

    @property
    def full_name(self) -> str:
        """Of the Ray actor: never the same twice in a run."""
        rank = f".rank{self.rank}" if self.rank else ""
        return f"{self.name}.{self.incarnation}{rank}"


class Worker:
    """The part of a process's life that is the same for all; `WorkerGroup` drives it.

    `run` and `status` are each kind's own, and `status` and `stop` come from another thread.
    """

    # Calls at a time of Ray's concurrency groups; a method that names none shares CONCURRENCY.
    concurrency_groups: ClassVar[Mapping[str, int]] = {}

    def __init__(self, context: RunContext, member: Member) -> None:
        if context.hub_token is not None:
            os.environ[HUB_TOKEN] = context.hub_token
        self._context = context
        self._config = with_patience(context.config)
        self._member = member
        self._answer_timeout_s = self._config.cluster.answer_timeout_s
        self._stopping = threading.Event()
        self._reserved: socket.socket | None = None

    def __repr__(self) -> str:
        return self._member.full_name

    def rendezvous(self) -> Meeting:
        """Reserve a port until `_meet`: one that is merely free is soon another process's."""
        self._reserved = socket.socket()
        self._reserved.bind(("", 0))
        return Meeting(ray.util.get_node_ip_address(), self._reserved.getsockname()[1])

    def start(self, meeting: Meeting) -> None:
        """Build what this process holds, and join the other ranks; raises SourceMixture."""
        self._node = ray.util.get_node_ip_address()
        check_source(self._context.source, node=self._node)
        pin_interface(self._node)
        if self._config.lm.device != "cpu":
            cap_memory(self._member.gpus)
        self._build(meeting)

    def progress(self) -> int:
        """Rises while this process loads: by one for each 64 MB read, written or taken."""
        return bytes_moved() // _PROGRESS_BYTES

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
            rank=self._member.rank,
            num_ranks=self._member.num_ranks,
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
    after `silence_timeout_s` without an answer, and weight store and registry need no place, but
    start anew then. Who needs a part that comes back only at a later try ends in an error that
    says so, and is replaced.
    """
    start_s, silence_s = config.cluster.start_timeout_s, config.cluster.silence_timeout_s
    longer_by_s = {
        "actors.score_timeout_s": 2 * start_s,
        "actors.pace_timeout_s": 2 * start_s,
        "learner.starvation_timeout_s": 2 * start_s,
        "learner.collective_timeout_s": 2 * start_s,
        "buffer.timeout_s": silence_s,
        "cluster.answer_timeout_s": silence_s + start_s,
    }
    return config.changed({key: attrgetter(key)(config) + s for key, s in longer_by_s.items()})


def cap_memory(share: float) -> None:
    """Let this process allocate no more than its share of its GPU, so that it fails and no other.

    What CUDA keeps for itself is not torch's to limit, so it is taken off. No share, no cap.
    """
    if 0 < share < 1 and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        taken = CUDA_MB * 2**20 / total
        torch.cuda.set_per_process_memory_fraction(max(share - taken, share / 2), 0)


def pin_interface(address: str) -> None:
    """Have gloo and NCCL use the interface that has `address`, Ray's; the environment goes first.

    Left alone, gloo asks for the address of the host's name, which is often loopback, and NCCL
    takes the first interface it likes, which may be a container's.
    """
    if (name := interface_of(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # else NCCL takes it for a prefix


def interface_of(address: str) -> str | None:
    """Name of the interface that has a numeric address; None if no interface has."""
    for name, assigned in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in assigned):
            return name
    return None
