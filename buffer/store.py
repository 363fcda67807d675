"""What the replay buffer asks of a store, and the reading of what may be damaged there."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from buffer.admission import Item, Plan
from buffer.config import BufferConfig
from buffer.stats import ReplayStats
from buffer.trajectory import MAX_TOKEN, MalformedTrajectory, Trajectory, unpack, unpack_group

KEPT_EVIDENCE = 100  # unreadable payloads
REMEMBERED_GROUPS = 4096  # among so many later ones a group sent again is recognised


Fate = Literal["conflict", "repeated", "none", "queued", "expired"]


class Arrival(NamedTuple):
    """A group that is to wait for the learner."""

    digest: str  # of its bytes: a group that was sent twice counts once
    version: int  # lowest policy version in it
    payload: bytes


class Commit(NamedTuple):
    """What became of a plan and its group; a conflict and a repetition change nothing."""

    fate: Fate
    evicted_capacity: int = 0


# Of one prompt: its revision, and of each item id, log-reward in nats, and tokens if readable.
Stored = tuple[int, list[tuple[str, float, bytes | None]]]
Drawn = tuple[int, list[tuple[int, bytes]]]  # eligible groups; arrival number and payload of each


class Store(Protocol):
    """Fresh groups and the replay of every prompt, as bytes; every method is atomic."""

    @property
    def place(self) -> str:
        """Where it is, for messages; without a password."""

    def commit(self, plan: Plan, arrival: Arrival | None, limits: BufferConfig) -> Commit:
        """Carry out a plan, and queue its group, if the prompt is still at the revision.

        Then evicts what exceeds the capacity: of all trajectories those furthest below the best of
        their prompt. The best of a prompt goes only where there are more prompts than capacity.
        """

    def draw(self, num_groups: int, version: int, limits: BufferConfig) -> Drawn:
        """Expire what is too old; then the freshest groups, all of `num_groups` or none."""

    def read_completions(self, prompt: str, shortest: int, longest: int) -> Stored:
        """Revision and replay of one prompt, the worst item first, equals by id.

        Of each item the tokens of its completion, little-endian, 32 bits: no bytes where its length
        lies outside the two, None where it cannot be read. With `shortest` above `longest` nothing
        is read.
        """

    def rank(self, prompts: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Ids and log-rewards of each prompt's replay, in the order of `read_completions`."""

    def fetch(self, ids: Sequence[str]) -> list[bytes | None]:
        """Payloads of items that are drawn from replay, counting the draw; None for those gone."""

    def peek(self, ids: Sequence[str]) -> list[bytes | None]:
        """As `fetch`, counting nothing."""

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


class Reader:
    """Decodes stored bytes; what cannot be decoded is reported, counted and put in quarantine."""

    def __init__(self, store: Store, *, warn: Callable[[str], None]) -> None:
        self._store = store
        self._warn = warn

    def prompt(self, prompt: str, lengths: tuple[int, int]) -> tuple[int, list[Item]]:
        """As `plan` sees it; completions whose length lies outside the two count as empty."""
        revision, found = self._store.read_completions(prompt, *lengths)
        items = []
        for id, log_reward, data in found:
            if data is None or np.frombuffer(data, "<u4").max(initial=0) >= MAX_TOKEN:
                self._quarantine(id, prompt, "its completion is missing or damaged")
            else:
                completion = np.frombuffer(data, "<i4").astype(np.int32, copy=False)
                items.append(Item(id, completion, log_reward))
        return revision, items

    def item(self, id: str, prompt: str, payload: bytes) -> Trajectory | None:
        """One replay payload, None if it went into quarantine."""
        try:
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
