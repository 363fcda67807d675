"""Taking groups in: plan on what is stored, commit if it still is, else plan again."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from buffer.admission import Item, lengths_near, plan
from buffer.config import BufferConfig
from buffer.store import Arrival, Change, Commit, Reader, Store, Write
from buffer.trajectory import MAX_GROUP, Trajectory, pack, pack_group

MAX_CONFLICTS = 200

Offered = Sequence[tuple[bytes, Trajectory]]  # with their packed bytes


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


class Writer:
    """The writing side of the buffer."""

    def __init__(self, store: Store, reader: Reader, config: BufferConfig) -> None:
        self._store = store
        self._reader = reader
        self._config = config

    def accept(self, group: Sequence[Trajectory], *, queue: bool) -> AddReport:
        """Admit trajectories of one prompt to replay and, with `queue`, the group to fresh.

        Without `queue` nothing that is stored changes or goes: what is new enters while there is
        room.
        """
        if not 1 <= len(group) <= MAX_GROUP:
            raise ValueError(f"a group has 1 to {MAX_GROUP} trajectories, not {len(group)}")
        if len({trajectory.prompt_key for trajectory in group}) != 1:
            raise ValueError("a group has trajectories of exactly one prompt")
        prompt, offered = group[0].prompt_key, [(pack(each), each) for each in group]
        arrival = arrival_of(offered) if queue else None
        for conflicts in range(MAX_CONFLICTS):
            change = self._plan(prompt, offered, keep_stored=not queue)
            answer = self._store.commit(change, arrival, self._config)
            if answer.fate == "repeated":
                return AddReport(repeated=True, conflicts=conflicts)
            if answer.fate != "conflict":
                return report(change, answer, conflicts)
        raise BufferContended(
            f"prompt {prompt!r} changed {MAX_CONFLICTS} times while a group of {len(group)} was"
            f" being added at {self._store.place}. Let fewer actors share a prompt"
        )

    def _plan(self, prompt: str, offered: Offered, *, keep_stored: bool) -> Change:
        """The change that the offered trajectories make to their prompt as it is stored now."""
        tolerance = self._config.near_duplicate_tolerance
        lengths = lengths_near([each.completion.size for _, each in offered], tolerance=tolerance)
        stored = self._reader.prompt(prompt, lengths)
        if keep_stored:
            known = {item.id for item in stored.items}
            offered = [(data, each) for data, each in offered if each.id not in known]
        newcomers = [Item(t.id, t.completion, t.terminal_log_reward) for _, t in offered]
        changes = plan(
            stored.items,
            newcomers,
            tolerance=tolerance,
            quota=self._config.quota_per_prompt,
            keep_stored=keep_stored,
        )
        return Change(
            prompt=prompt,
            revision=stored.revision,
            offered=len(offered),
            plan=changes,
            writes=[
                Write(
                    id=newcomers[put.row].id,
                    log_reward=newcomers[put.row].log_reward,
                    payload=offered[put.row][0],
                    duplicates=put.duplicates,
                    near_replaced=put.near_replaced,
                )
                for put in changes.put
            ],
            keep_stored=keep_stored,
        )


def arrival_of(offered: Offered) -> Arrival:
    """The group as it waits for the learner."""
    payload = pack_group([data for data, _ in offered])
    return Arrival(
        digest=hashlib.blake2b(payload, digest_size=16).hexdigest(),
        version=min(trajectory.policy_version for _, trajectory in offered),
        payload=payload,
    )


def report(change: Change, answer: Commit, conflicts: int) -> AddReport:
    """Put a change that was committed into words."""
    return AddReport(
        offered=change.offered,
        duplicates=change.plan.duplicates,
        near_rejected=change.plan.near_rejected,
        near_replaced=change.plan.near_replaced,
        evicted_quota=change.plan.evicted_quota,
        evicted_capacity=answer.evicted_capacity,
        queued=answer.fate == "queued",
        expired=answer.fate == "expired",
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
