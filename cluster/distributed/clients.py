"""Clients of a run's other processes: weight store, replica registry, replicas, other ranks."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle

from actors.protocols import PublishedWeights
from cluster.distributed.waiting import PeerDied, PeerTimeout, wait_for
from reward.replica import ScoreFailed, ScoreTimeout
from reward.request import ScoreItem

_POLL_S = 0.5
_REMIND_S = 2.0


class NobodyScores(RuntimeError):
    """The run is stopped and no reward replica lives: none will come any more."""


class _RemoteService:
    """Waits for the answers of a small process, with a deadline."""

    peer: str

    def __init__(self, handle: ActorHandle, *, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    def _answer(self, ref: "ray.ObjectRef[Any]", phase: str) -> Any:
        return wait_for(ref, peer=self.peer, phase=phase, timeout_s=self._timeout_s)


class RemoteWeightStore(_RemoteService):
    """`WeightStore` as its clients see it: a `WeightSource` and a `WeightSink`."""

    peer = "weight store"

    def newer_than(self, version: int) -> PublishedWeights | None:
        """See `WeightStore.newer_than`."""
        return self._answer(self._handle.newer_than.remote(version), "newer_than")

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        """See `WeightStore.publish`."""
        ref = self._handle.publish.remote(data, version=version, checksum=checksum)
        self._answer(ref, "publish")


class RemoteRegistry(_RemoteService):
    """The registry of reward replicas: scorers ask it, the supervisor keeps it up to date."""

    peer = "replica registry"
    _announced: tuple[str, ...] = ()
    _announced_s = float("-inf")

    def names(self) -> tuple[str, ...]:
        """See `ReplicaRegistry.names`."""
        return self._answer(self._handle.names.remote(), "names")

    def announce(self, names: tuple[str, ...], *, wait: bool = True) -> None:
        """Announce the names where they have changed, or were announced a while ago.

        A registry that was restarted has forgotten them, and nobody hears of its restart.

        Args:
            wait: until changed names are known there; else they are on their way.

        Raises PeerTimeout, PeerDied.
        """
        changed = names != self._announced
        if not changed and time.monotonic() - self._announced_s < _REMIND_S:
            return
        ref = self._handle.announce.remote(names)
        if changed and wait:
            self._answer(ref, "announce")
        self._announced, self._announced_s = names, time.monotonic()


class RemoteScorer:
    """Spreads scorings over the live reward replicas; a failed one is tried on another.

    Args:
        registry: knows which replicas live.
        namespace: the run's Ray namespace.
        attempt_s: seconds after which one replica's answer counts as late.
        handover_s: seconds within which some replica has to take a scoring; it may have to come up
            before.
        stop: whether the caller is to finish, which it cannot without a replica.
        first: index of the replica to begin with, so that actors do not all start on one.

    `retries` counts scorings that failed or were late, and were handed to a replica again.
    """

    def __init__(
        self,
        registry: RemoteRegistry,
        *,
        namespace: str,
        attempt_s: float,
        handover_s: float,
        stop: Callable[[], bool],
        first: int = 0,
    ) -> None:
        self._registry = registry
        self._namespace = namespace
        self._attempt_s = attempt_s
        self._handover_s = handover_s
        self._stop = stop
        self._turn = itertools.count(first)
        self._handles: dict[str, ActorHandle] = {}
        self.retries = 0

    def submit(self, items: Sequence[ScoreItem]) -> "RemoteScores":
        """Start to score; returns at once, unless no replica lives yet; raises as `start` does."""
        return RemoteScores(self, list(items), attempt_s=self._attempt_s)

    def start(
        self, items: list[ScoreItem], *, avoid: str | None = None, timeout_s: float | None = None
    ) -> "tuple[str, ray.ObjectRef[Any]]":
        """Hand the items to the next live replica, another than `avoid` where there is one.

        Args:
            timeout_s: None is `handover_s`.

        Raises:
            PeerTimeout: none took them in time.
            NobodyScores: none lives, and `stop()` holds.
        """
        deadline = time.monotonic() + (self._handover_s if timeout_s is None else timeout_s)
        began = time.monotonic()
        while True:
            names = self._registry.names()
            if others := [name for name in names if name != avoid] or list(names):
                name = others[next(self._turn) % len(others)]
                try:
                    return name, self._handle(name).score.remote(items)
                except ValueError:  # Ray: no actor of that name, the replica has just died
                    self._handles.pop(name, None)
            elif self._stop():
                raise NobodyScores("no reward replica lives, and the run is being stopped")
            if (now := time.monotonic()) > deadline:
                raise PeerTimeout(
                    f"reward replicas: none of {len(names)} took a scoring within "
                    f"{now - began:.0f} s"
                )
            time.sleep(_POLL_S)

    def forget(self, name: str) -> None:
        """Look the replica's name up again next time: it may have been replaced."""
        self._handles.pop(name, None)

    def _handle(self, name: str) -> ActorHandle:
        if name not in self._handles:
            self._handles[name] = ray.get_actor(name, namespace=self._namespace)
        return self._handles[name]


class RemoteScores:
    """One scoring under way; `result` retries it elsewhere until its own deadline."""

    def __init__(self, scorer: RemoteScorer, items: list[ScoreItem], *, attempt_s: float) -> None:
        self._scorer = scorer
        self._items = items
        self._attempt_s = attempt_s
        self._replica, self._ref = scorer.start(items)

    def result(self, timeout_s: float) -> list[NDArray[np.float32]]:
        """Log-rewards [S] in nats for each item.

        Raises:
            PeerTimeout, PeerDied, ScoreTimeout, ScoreFailed: no replica answered in `timeout_s`.
            NobodyScores: see `RemoteScorer.start`.
            BadItem: an item cannot be scored; another replica would say the same.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(deadline - time.monotonic(), 0.0)
            try:
                return wait_for(
                    self._ref,
                    peer=f"reward replica {self._replica}",
                    phase=f"scoring {len(self._items)} items",
                    timeout_s=min(self._attempt_s, left_s),
                )
            except (PeerTimeout, PeerDied, ScoreTimeout, ScoreFailed):
                self._scorer.forget(self._replica)
                if time.monotonic() + _POLL_S > deadline:
                    raise
                time.sleep(_POLL_S)
                self._scorer.retries += 1
                self._replica, self._ref = self._scorer.start(
                    self._items, avoid=self._replica, timeout_s=deadline - time.monotonic()
                )


class RemotePeer:
    """A rank above 0, as rank 0's replica sees it."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def forward(self, share: Sequence[Any]) -> "Future[Any]":
        """Start the peer's part; returns at once."""
        return self._handle.forward.remote(share).future()
