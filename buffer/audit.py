"""Recounting the buffer from its data, trusting no index and no counter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from buffer.config import BufferConfig
from buffer.near_duplicate import near_duplicates
from buffer.stats import Counters, read_counters
from buffer.store import Store
from buffer.trajectory import MalformedTrajectory, Trajectory, unpack, unpack_group


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Result of one recount; discrepancies are sentences, none when all is well."""

    replay_size: int
    fresh_groups: int
    counters: Counters
    discrepancies: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether accepted = stored + evicted + rejected by rule, and every index agrees."""
        return not self.discrepancies


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The store as of one instant."""

    meta: Mapping[bytes, bytes]
    payload: Mapping[bytes, bytes]
    priority: Mapping[bytes, float]
    fresh: Mapping[bytes, float]
    undrawn: Mapping[bytes, float]
    groups: Mapping[bytes, bytes]
    draws: Mapping[bytes, bytes]
    sampled: Mapping[bytes, bytes]
    duplicates: Mapping[bytes, bytes]
    near_replaced: Mapping[bytes, bytes]
    prompts: Mapping[bytes, Mapping[bytes, float]]


def audit_store(store: Store, config: BufferConfig) -> Audit:
    """Read everything at once and compare it with itself, its counters and the rules."""
    snapshot = read_snapshot(store.call("snapshot"))
    counters = read_counters(snapshot.meta)
    checks = (
        check_counters(snapshot, counters),
        check_replay_indexes(snapshot),
        check_replay_rules(snapshot, config),
        check_fresh(snapshot, config),
    )
    return Audit(
        replay_size=len(snapshot.payload),
        fresh_groups=len(snapshot.groups),
        counters=counters,
        discrepancies=tuple(sentence for check in checks for sentence in check),
    )


def read_snapshot(answer: Sequence[Any]) -> Snapshot:
    """Give the flat lists of snapshot.lua their names."""
    meta, payload, priority, fresh, undrawn, groups, draws, *tallies, prompts = answer
    sampled, duplicates, near_replaced = map(pairs, tallies)
    return Snapshot(
        meta=pairs(meta),
        payload=pairs(payload),
        priority=scores(priority),
        fresh=scores(fresh),
        undrawn=scores(undrawn),
        groups=pairs(groups),
        draws=pairs(draws),
        sampled=sampled,
        duplicates=duplicates,
        near_replaced=near_replaced,
        prompts={prompt: scores(items) for prompt, items in pairs(prompts).items()},
    )


def check_counters(snapshot: Snapshot, counters: Counters) -> Iterator[str]:
    """Everything that came in is here, or its leaving was counted."""
    replay = len(snapshot.payload) + counters.left_replay
    if counters.offered != replay:
        yield f"{counters.offered} trajectories offered, {replay} stored or counted as gone"
    fresh = len(snapshot.groups) + counters.left_fresh
    if counters.groups_accepted != fresh:
        yield f"{counters.groups_accepted} groups accepted, {fresh} waiting or counted as gone"
    for what, tally, counted in (
        ("duplicates", snapshot.duplicates, counters.duplicates),
        ("near-duplicates replaced", snapshot.near_replaced, counters.near_replaced),
    ):
        if (attributed := sum(map(int, tally.values()))) > counted:
            yield f"{attributed} {what} are put down to items, {counted} happened"


def check_replay_indexes(snapshot: Snapshot) -> Iterator[str]:
    """Payloads, the global ranking and the rankings of the prompts hold the same items."""
    by_prompt = {
        id + prompt: score
        for prompt, items in snapshot.prompts.items()
        for id, score in items.items()
    }
    if by_prompt != snapshot.priority:
        differing = by_prompt.items() ^ snapshot.priority.items()
        yield f"the ranking and the prompts differ in {len(differing)} entries"
    ranked = {member[:32] for member in snapshot.priority}
    if ranked != snapshot.payload.keys():
        differing_ids = ranked ^ snapshot.payload.keys()
        yield f"{len(differing_ids)} ids have a rank or a payload, but not both"
    for what, tally in (
        ("draws", snapshot.sampled),
        ("duplicates", snapshot.duplicates),
        ("near-duplicates replaced", snapshot.near_replaced),
    ):
        if strays := tally.keys() - snapshot.payload.keys():
            yield f"{len(strays)} counts of {what} belong to nothing stored"


def check_replay_rules(snapshot: Snapshot, config: BufferConfig) -> Iterator[str]:
    """Every payload is what its index says, and every prompt keeps its rules."""
    if len(snapshot.payload) > config.capacity:
        yield f"{len(snapshot.payload)} trajectories exceed the capacity {config.capacity}"
    for prompt, items in snapshot.prompts.items():
        name = prompt.decode()
        if len(items) > config.quota_per_prompt:
            yield f"prompt {name!r} has {len(items)} items, quota {config.quota_per_prompt}"
        readable: list[Trajectory] = []
        for id, score in items.items():
            try:
                trajectory = unpack(snapshot.payload.get(id, b""))
            except MalformedTrajectory as error:
                yield f"payload of {id.decode()} is unreadable: {error}"
                continue
            readable.append(trajectory)
            found = (trajectory.id, trajectory.prompt_key, trajectory.terminal_log_reward)
            if found != (id.decode(), name, score):
                yield f"payload of {(id.decode(), name, score)} is that of {found}"
        completions = [trajectory.completion for trajectory in readable]
        near = near_duplicates(completions, completions, tolerance=config.near_duplicate_tolerance)
        if num_near := int(np.triu(near, 1).sum()):
            yield f"prompt {name!r} has {num_near} pairs of near-duplicates"


def check_fresh(snapshot: Snapshot, config: BufferConfig) -> Iterator[str]:
    """Waiting groups are readable, ranked by their version, and drawn no more than allowed."""
    if snapshot.fresh.keys() != snapshot.groups.keys():
        yield f"{len(snapshot.fresh.keys() ^ snapshot.groups.keys())} groups lack rank or payload"
    if snapshot.fresh.keys() - snapshot.draws.keys() != snapshot.undrawn.keys():
        yield "the undrawn groups are not those that wait without a draw"
    if len(snapshot.groups) > config.fresh_capacity:
        yield f"{len(snapshot.groups)} groups exceed fresh_capacity {config.fresh_capacity}"
    for seq, draws in snapshot.draws.items():
        if seq not in snapshot.groups or int(draws) >= config.max_draws:
            yield f"group {seq.decode()} was drawn {int(draws)} times and still has a count"
    for seq, payload in snapshot.groups.items():
        try:
            version = min(trajectory.policy_version for trajectory in unpack_group(payload))
        except MalformedTrajectory as error:
            yield f"group {seq.decode()} is unreadable: {error}"
            continue
        if snapshot.fresh.get(seq) != version:
            yield f"group {seq.decode()} of version {version} ranks as {snapshot.fresh.get(seq)}"


def pairs(flat: Sequence[Any]) -> dict[bytes, Any]:
    """A flat list of keys and values as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def scores(flat: Sequence[bytes]) -> dict[bytes, float]:
    """A flat list of members and scores as a dict."""
    return {member: float(score) for member, score in pairs(flat).items()}
