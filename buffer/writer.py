"""Taking groups in: plan on what is stored, commit if it still is, else plan again."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

from buffer.admission import Item, lengths_near, plan
from buffer.config import BufferConfig
from buffer.store import Arrival, Reader, Store
from buffer.trajectory import MAX_GROUP, Trajectory, pack, pack_group

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


def accept(
    group: Sequence[Trajectory], store: Store, reader: Reader, config: BufferConfig, *, queue: bool
) -> AddReport:
    """Admit trajectories of one prompt to replay and, with `queue`, the group to fresh.

    Without `queue` nothing that is stored changes or goes: what is new enters while there is room.
    """
    if not 1 <= len(group) <= MAX_GROUP:
        raise ValueError(f"a group has 1 to {MAX_GROUP} trajectories, not {len(group)}")
    if len({trajectory.prompt_key for trajectory in group}) != 1:
        raise ValueError("a group has trajectories of exactly one prompt")
    prompt, tolerance = group[0].prompt_key, config.near_duplicate_tolerance
    newcomers = [Item(t.id, t.completion, t.terminal_log_reward, pack(t)) for t in group]
    lengths = lengths_near([item.completion.size for item in newcomers], tolerance=tolerance)
    arrival = arrival_of(group, newcomers) if queue else None
    for conflicts in range(MAX_CONFLICTS):
        revision, stored = reader.prompt(prompt, lengths)
        change = plan(
            stored,
            newcomers,
            tolerance=tolerance,
            quota=config.quota_per_prompt,
            keep_stored=not queue,
        )
        answer = store.commit(prompt, revision, change, arrival, config)
        if answer.fate == "repeated":
            return AddReport(repeated=True, conflicts=conflicts)
        if answer.fate != "conflict":
            return AddReport(
                **change.counts,
                evicted_capacity=answer.evicted_capacity,
                queued=answer.fate == "queued",
                expired=answer.fate == "expired",
                repeated=False,
                conflicts=conflicts,
            )
    raise BufferContended(
        f"prompt {prompt!r} changed {MAX_CONFLICTS} times while a group of {len(group)} was"
        f" being added at {store.place}. Let fewer actors share a prompt"
    )


def arrival_of(group: Sequence[Trajectory], newcomers: Sequence[Item]) -> Arrival:
    """The group as it waits for the learner."""
    payload = pack_group([item.payload for item in newcomers])
    return Arrival(
        digest=hashlib.blake2b(payload, digest_size=16).hexdigest(),
        version=min(trajectory.policy_version for trajectory in group),
        payload=payload,
    )


def total(reports: Sequence[AddReport]) -> AddReport:
    """Sum of the counts of several calls that queued nothing."""
    names = [field.name for field in fields(AddReport) if field.type is int]
    return AddReport(**{name: sum(getattr(each, name) for each in reports) for name in names})
