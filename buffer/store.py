"""What the replay buffer asks of a store, and the reading of what may be damaged there.

Two stores keep this contract: `buffer.redis_store`, which processes share, and `buffer.memory`.
Every method is atomic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from buffer.admission import Item, Plan
from buffer.audit import Contents
from buffer.config import BufferConfig
from buffer.stats import ReplayStats
from buffer.trajectory import MAX_TOKEN, MalformedTrajectory, Trajectory, unpack, unpack_group

# Unreadable payloads that are kept as evidence.
KEPT_EVIDENCE = 100
# A group sent again is recognised among this many later ones.
REMEMBERED_GROUPS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A group that is to wait for the learner."""

    digest: str  # of its bytes: a group that was sent twice counts once
    version: int  # lowest policy version in it
    payload: bytes


class Commit(NamedTuple):
    """What became of a plan and its group; a conflict and a repetition change nothing."""

    fate: Literal["conflict", "repeated", "none", "queued", "expired"]
    evicted_capacity: int = 0


class StoredItem(NamedTuple):
    """An item of a prompt's replay."""

    id: str
    log_reward: float  # it is ranked by, nats
    data: bytes | None  # its payload or a part of that; None where the store has lost it


class Store(Protocol):
    """Fresh groups and the replay of every prompt, as bytes."""

    @property
    def place(self) -> str:
        """Where it is, for messages; without a password."""

    def commit(
        self,
        prompt: str,
        revision: int,
        plan: Plan,
        arrival: Arrival | None,
        limits: BufferConfig,
    ) -> Commit:
        """Carry out a plan, and queue its group, if the prompt is still at the revision.

        Then evicts what exceeds the capacity: of all trajectories those furthest below the best of
        their prompt. The best of a prompt goes only where there are more prompts than capacity.
        """

    def draw(
        self, num_groups: int, version: int, limits: BufferConfig
    ) -> tuple[int, list[tuple[int, bytes]]]:
        """Expire what is too old; then the freshest groups, all of `num_groups` or none.

        Returns the number of groups that were eligible, and (arrival number, payload) of each.
        """

    def read_prompt(self, prompt: str) -> tuple[int, list[StoredItem]]:
        """Revision and replay of one prompt, the worst item first, equals by id."""

    def read_completions(
        self, prompt: str, shortest: int, longest: int
    ) -> tuple[int, list[StoredItem]]:
        """As `read_prompt`, but of each item the tokens of its completion: little-endian, 32 bits.

        No bytes for a completion whose length lies outside the two, None for one that cannot be
        read. Where `shortest` is above `longest` nothing is read.
        """

    def rank(self, prompts: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Ids and log-rewards of each prompt's replay, in the order of `read_prompt`."""

    def fetch(self, ids: Sequence[str]) -> list[bytes | None]:
        """Payloads of items that are drawn from replay, counting the draw; None for those gone."""

    def quarantine_item(self, id: str, prompt: str) -> None:
        """Take an item out of replay, and keep its bytes as evidence."""

    def quarantine_group(self, number: int, payload: bytes) -> None:
        """Take a drawn group out of the way, and keep its bytes as evidence."""

    def newest_group(self) -> bytes | None:
        """Payload of the freshest group, which goes on waiting; None where none waits."""

    def depth(self) -> int:
        """Fresh groups that were never drawn."""

    def prompts(self) -> list[str]:
        """Every prompt that was ever written, sorted."""

    def stats(self) -> ReplayStats:
        """Sizes, ages and counters."""

    def contents(self) -> Contents:
        """Everything, for the audit."""


class Reader:
    """Decodes stored bytes; what cannot be decoded is reported, counted and moved to quarantine.

    A damaged payload must cost one trajectory, not the learner.
    """

    def __init__(self, store: Store, *, warn: Callable[[str], None]) -> None:
        self._store = store
        self._warn = warn

    def prompt(self, prompt: str, lengths: tuple[int, int]) -> tuple[int, list[Item]]:
        """Revision and replay of one prompt as `plan` sees it, the worst item first.

        Completions whose length lies outside the two count as empty.
        """
        revision, found = self._store.read_completions(prompt, *lengths)
        items = []
        for id, log_reward, data in found:
            if data is None or np.frombuffer(data, "<u4").max(initial=0) >= MAX_TOKEN:
                self._quarantine(id, prompt, "its completion is missing or damaged")
            else:
                completion = np.frombuffer(data, "<i4").astype(np.int32, copy=False)
                items.append(Item(id, completion, log_reward))
        return revision, items

    def trajectories(self, prompt: str) -> list[Trajectory]:
        """Everything readable in the replay of one prompt, worst first."""
        _, found = self._store.read_prompt(prompt)
        read = (self.item(id, prompt, payload) for id, _, payload in found)
        return [trajectory for trajectory in read if trajectory is not None]

    def item(self, id: str, prompt: str, payload: bytes | None) -> Trajectory | None:
        """One replay payload, None if it went into quarantine."""
        try:
            if payload is None:
                raise MalformedTrajectory("its payload is missing")
            return unpack(payload)
        except MalformedTrajectory as error:
            self._quarantine(id, prompt, str(error))
            return None

    def _quarantine(self, id: str, prompt: str, reason: str) -> None:
        self._store.quarantine_item(id, prompt)
        self._warn(f"quarantined trajectory {id} of prompt {prompt!r}: {reason}")

    def group(self, number: int, payload: bytes) -> tuple[Trajectory, ...] | None:
        """One fresh group, None if it went into quarantine, which one bad member suffices for."""
        try:
            return unpack_group(payload)
        except MalformedTrajectory as error:
            self._store.quarantine_group(number, payload)
            self._warn(f"quarantined fresh group {number}: {error}")
            return None
