"""Taking groups in: plan on what is stored, commit if it still is, else plan again."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from buffer.admission import Item, Plan, plan
from buffer.config import BufferConfig
from buffer.reader import Reader
from buffer.store import Store
from buffer.trajectory import MAX_GROUP, Trajectory, pack, pack_group

# A group sent again is recognised among this many later ones.
REMEMBERED_GROUPS = 4096
MAX_CONFLICTS = 200


class BufferContended(RuntimeError):
    """Other writers changed one prompt again and again between our reading and writing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddReport:
    """What one call did. Replaced and evicted items may have come with earlier calls."""

    offered: int = 0
    duplicates: int = 0  # stored before under the same id: the new payload replaced it
    near_rejected: int = 0
    near_replaced: int = 0
    evicted_quota: int = 0
    evicted_capacity: int = 0
    queued: bool = False  # the group waits for the learner
    expired: bool = False  # the group came too late for the learner; replay has it
    repeated: bool = False  # this very group was accepted before: nothing has changed
    conflicts: int = 0  # times another writer was faster


class Intake:
    """The writing side of the buffer."""

    def __init__(self, store: Store, reader: Reader, config: BufferConfig) -> None:
        self._store = store
        self._reader = reader
        self._config = config

    def accept(self, group: Sequence[Trajectory], *, queue: bool) -> AddReport:
        """Admit trajectories of one prompt to replay and, with `queue`, the group to fresh."""
        if not 1 <= len(group) <= MAX_GROUP:
            raise ValueError(f"a group has 1 to {MAX_GROUP} trajectories, not {len(group)}")
        if len({trajectory.prompt_key for trajectory in group}) != 1:
            raise ValueError("a group has trajectories of exactly one prompt")
        prompt = group[0].prompt_key
        payloads = [pack(trajectory) for trajectory in group]
        newcomers = [Item(t.id, t.completion, t.terminal_log_reward) for t in group]
        queueing = self._queueing(group, payloads) if queue else ()
        for conflicts in range(MAX_CONFLICTS):
            revision, changes = self._plan(prompt, newcomers)
            changing = self._changing(changes, newcomers, payloads)
            answer = self._store.call("commit", prompt, revision, *changing, *queueing)
            if answer[0] == b"repeated":
                return AddReport(repeated=True, conflicts=conflicts)
            if answer[0] == b"done":
                return report(changes, len(group), answer, conflicts)
        raise BufferContended(
            f"prompt {prompt!r} changed {MAX_CONFLICTS} times while a group of {len(group)} was"
            f" being added at {self._store.place}. Let fewer actors share a prompt"
        )

    def _plan(self, prompt: str, newcomers: Sequence[Item]) -> tuple[bytes, Plan]:
        """What to change, and the revision that this holds for."""
        stored = self._reader.prompt(prompt)
        changes = plan(
            [
                Item(id, trajectory.completion, stored.log_reward[id])
                for id, trajectory in stored.trajectories.items()
            ],
            newcomers,
            tolerance=self._config.near_duplicate_tolerance,
            quota=self._config.quota_per_prompt,
        )
        return stored.revision, changes

    def _changing(
        self, changes: Plan, newcomers: Sequence[Item], payloads: Sequence[bytes]
    ) -> list[str | int | float | bytes]:
        """Arguments of commit.lua from the capacity on, as far as replay is concerned."""
        arguments: list[str | int | float | bytes] = [
            self._config.capacity,
            len(newcomers),
            changes.duplicates,
            changes.near_rejected,
            changes.near_replaced,
            changes.evicted_quota,
            len(changes.removed),
            *changes.removed,
            len(changes.put),
        ]
        for put in changes.put:
            newcomer = newcomers[put.row]
            arguments += (newcomer.id, newcomer.log_reward, payloads[put.row])
            arguments += (put.duplicates, put.near_replaced)
        return arguments

    def _queueing(
        self, group: Sequence[Trajectory], payloads: Sequence[bytes]
    ) -> tuple[str | int | bytes, ...]:
        """Arguments of commit.lua that queue the group."""
        payload = pack_group(payloads)
        return (
            hashlib.blake2b(payload, digest_size=16).hexdigest(),
            min(trajectory.policy_version for trajectory in group),
            self._config.max_age,
            self._config.fresh_capacity,
            REMEMBERED_GROUPS,
            payload,
        )


def report(changes: Plan, offered: int, answer: Sequence[bytes | int], conflicts: int) -> AddReport:
    """Put the plan and the answer of commit.lua into words."""
    _, evicted_capacity, fate = answer
    return AddReport(
        offered=offered,
        duplicates=changes.duplicates,
        near_rejected=changes.near_rejected,
        near_replaced=changes.near_replaced,
        evicted_quota=changes.evicted_quota,
        evicted_capacity=int(evicted_capacity),
        queued=fate == b"queued",
        expired=fate == b"expired",
        conflicts=conflicts,
    )


def total(reports: Sequence[AddReport]) -> AddReport:
    """Sum of the counts of several calls that queued nothing."""
    counts = [asdict(report) for report in reports]
    return AddReport(
        **{
            name: sum(count[name] for count in counts)
            for name in AddReport.__dataclass_fields__
            if name not in ("queued", "expired", "repeated")
        }
    )
