"""Clients of a run's other processes: weight store, replica registry, replicas, other ranks."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError

from actors.weight_sources import Published, PublishedWeights
from cluster.distributed.waiting import PeerDied, PeerTimeout, wait_for
from reward.replica import ScoreFailed
from reward.request import ScoreItem

_POLL_S = 0.5
_REMIND_S = 2.0
_STATUS_S = 10.0


class NobodyScores(RuntimeError):
    """The run is stopped and no reward replica lives: none will come any more."""


class _RemoteService:
    """Waits for the answers of a small process, with a deadline."""

    peer: str

    def __init__(self, handle: ActorHandle, *, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    def _ask(self, method: str, *arguments: Any, **settings: Any) -> Any:
        ref = getattr(self._handle, method).remote(*arguments, **settings)
        return wait_for(ref, peer=self.peer, phase=method, timeout_s=self._timeout_s)


class RemoteWeightStore(_RemoteService):
    """`WeightStore` as its clients see it: a `WeightSource` and a `WeightSink`."""

    peer = "weight store"

    def newer_than(self, version: int) -> PublishedWeights | None:
        fresh: Published[ray.ObjectRef[Any]] | None = self._ask("newer_than", version)
        if fresh is None:
            return None
        try:
            data_N = wait_for(fresh.data, peer=self.peer, phase="fetch", timeout_s=self._timeout_s)
        except ObjectLostError:  # with the store, which comes back empty
            return None
        return Published(fresh.version, data_N.tobytes(), fresh.checksum)

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        data_N = np.frombuffer(data, dtype=np.uint8)  # read where it lies, by others too
        self._ask("take", data_N, version=version, checksum=checksum)


class RemoteRegistry(_RemoteService):
    """The registry of reward replicas: scorers ask it, the supervisor keeps it up to date."""

    peer = "replica registry"
    _announced: tuple[str, ...] = ()
    _announced_s = float("-inf")

    def names(self) -> tuple[str, ...]:
        return self._ask("names")

    def announce(self, names: tuple[str, ...], *, wait: bool = True) -> None:
        """Announce the names where they have changed, or were announced a while ago.

        A registry that was restarted has forgotten them, and nobody hears of its restart. Where
        they have changed and `wait` says so, they are known there when this returns.
        """
        changed = names != self._announced
        if changed and wait:
            self._ask("announce", names)
        elif changed or time.monotonic() - self._announced_s >= _REMIND_S:
            self._handle.announce.remote(names)
        else:
            return
        self._announced, self._announced_s = names, time.monotonic()


@dataclass
class RemoteScorer:
    """Spreads scorings over the live reward replicas; a failed one is tried on another."""

    registry: RemoteRegistry
    _: KW_ONLY
    namespace: str
    attempt_s: float  # after which one replica's answer counts as late
    handover_s: float  # within which some replica takes a scoring; it may have to come up before
    stop: Callable[[], bool]  # whether the caller is to finish, which needs a replica
    turn: int = 0  # of the replica that is next, so that actors do not all begin with one
    retries: int = field(default=0, init=False)  # scorings that failed or were late
    _handles: dict[str, ActorHandle] = field(default_factory=dict, init=False)

    def submit(self, items: Sequence[ScoreItem]) -> "RemoteScores":
        """Start to score; returns at once, unless no replica lives yet; raises as `start` does."""
        return RemoteScores(self, list(items))

    def start(
        self, items: list[ScoreItem], *, avoid: str = "", timeout_s: float | None = None
    ) -> "tuple[str, ray.ObjectRef[Any]]":
        """Hand the items to the next live replica, another than `avoid` where there is one.

        Raises:
            PeerTimeout: none took them within `timeout_s`, or `handover_s`.
            NobodyScores: none lives, and `stop()` holds.
        """
        began = time.monotonic()
        deadline = began + (self.handover_s if timeout_s is None else timeout_s)
        while True:
            names = self.registry.names()
            if others := [name for name in names if name != avoid] or list(names):
                name = others[self.turn % len(others)]
                self.turn += 1
                try:
                    return name, self._handle(name).score.remote(items)
                except ValueError:  # Ray: no actor of that name, the replica has just died
                    self.forget(name)
            elif self.stop():
                raise NobodyScores("no reward replica lives, and the run is being stopped")
            if (now := time.monotonic()) > deadline:
                raise PeerTimeout(
                    f"reward replicas: none of {len(names)} took a scoring within "
                    f"{now - began:.0f} s"
                )
            time.sleep(_POLL_S)

    def unmoved_s(self, name: str) -> float | None:
        """For how long a replica has scored nothing; None where it does not say so soon.

        Raises PeerDied.
        """
        peer = f"reward replica {name}"
        try:
            status = self._handle(name).status.remote()
        except ValueError as error:  # Ray: no actor of that name
            raise PeerDied(f"{peer}: died before it was asked for its status") from error
        try:
            stats = wait_for(status, peer=peer, phase="status", timeout_s=_STATUS_S)
        except PeerTimeout:  # busy, or stuck: the supervisor finds out
            return None
        return float(stats["unmoved_s"])

    def forget(self, name: str) -> None:
        """Look the replica's name up again next time: it may have been replaced."""
        self._handles.pop(name, None)

    def _handle(self, name: str) -> ActorHandle:
        if name not in self._handles:
            self._handles[name] = ray.get_actor(name, namespace=self.namespace)
        return self._handles[name]


class RemoteScores:
    """One scoring under way; `result` retries it elsewhere until its own deadline."""

    def __init__(self, scorer: RemoteScorer, items: list[ScoreItem]) -> None:
        self._scorer = scorer
        self._items = items
        self._replica, self._ref = scorer.start(items)
        self._late_s = time.monotonic() + scorer.attempt_s

    def done(self) -> bool:
        """Whether `result` would not wait, or is needed to ask another replica."""
        if ray.wait([self._ref], timeout=0, fetch_local=False)[0]:
            return True
        if time.monotonic() <= self._late_s:
            return False
        try:
            unmoved_s = self._scorer.unmoved_s(self._replica)
        except PeerDied:
            return True
        if unmoved_s is None or unmoved_s >= self._scorer.attempt_s:
            return True
        self._late_s = time.monotonic() + self._scorer.attempt_s - unmoved_s
        return False

    def result(self, timeout_s: float) -> list[NDArray[np.float32]]:
        """Log-rewards [S] in nats for each item.

        Raises:
            PeerTimeout, PeerDied, ScoreFailed: no replica answered, or came any further, in
                `timeout_s`.
            BadItem: an item cannot be scored; another replica would say the same.
        """
        scorer, self._moved = self._scorer, time.monotonic()
        while True:
            try:
                return self._answer(timeout_s)
            except (PeerTimeout, PeerDied, ScoreFailed):
                scorer.forget(self._replica)
                deadline = self._moved + timeout_s
                if time.monotonic() + _POLL_S > deadline:
                    raise
                time.sleep(_POLL_S)
                scorer.retries += 1
                left_s = deadline - time.monotonic()
                self._replica, self._ref = scorer.start(
                    self._items, avoid=self._replica, timeout_s=left_s
                )

    def _answer(self, timeout_s: float) -> list[NDArray[np.float32]]:
        """Of the replica at hand; PeerTimeout once that comes no further for `attempt_s`, or its
        last sign is `timeout_s` ago."""
        left_s = max(self._moved + timeout_s - time.monotonic(), 0.0)
        wait_s = patience_s = min(self._scorer.attempt_s, left_s)
        while True:
            try:
                return wait_for(
                    self._ref,
                    peer=f"reward replica {self._replica}",
                    phase=f"scoring {len(self._items)} items",
                    timeout_s=wait_s,
                )
            except PeerTimeout:
                unmoved_s = self._scorer.unmoved_s(self._replica)
                if unmoved_s is None:  # the supervisor ends it where it stays silent
                    wait_s = min(patience_s, self._moved + timeout_s - time.monotonic())
                else:
                    wait_s = patience_s - unmoved_s
                if wait_s <= 0:
                    raise
                if unmoved_s is not None:
                    self._moved = time.monotonic() - unmoved_s


class RemotePeer:
    """A rank above 0, as rank 0's replica sees it."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def forward(self, share: Sequence[Any]) -> "Future[Any]":
        """Start the peer's part; returns at once."""
        return self._handle.forward.remote(share).future()
