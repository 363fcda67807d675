"""Recounting the buffer from its data, trusting no index and no counter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from buffer.admission import advantages, near_duplicates
from buffer.config import BufferConfig
from buffer.stats import LEAVING_FRESH, LEAVING_REPLAY, Counters
from buffer.trajectory import MalformedTrajectory, Trajectory, unpack, unpack_group


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Contents:
    """A store as of one instant."""

    meta: Mapping[str, int]  # counters, and the version of the learner's last draw
    payload: Mapping[str, bytes]  # packed trajectories by id
    priority: Mapping[tuple[str, str], float]  # by id and prompt: see `advantages`
    prompts: Mapping[str, Mapping[str, float]]  # terminal log-rewards, nats, by prompt and id
    sampled: Mapping[str, int]  # by id
    duplicates: Mapping[str, int]  # by id
    near_replaced: Mapping[str, int]  # by id
    groups: Mapping[int, bytes]  # packed groups by arrival number
    fresh: Mapping[int, int]  # lowest policy version of each
    undrawn: frozenset[int]
    draws: Mapping[int, int]  # of those that were drawn


def audit_contents(contents: Contents, config: BufferConfig) -> Audit:
    """Compare a store with itself, its counters and the rules."""
    counters = Counters.read(contents.meta)
    discrepancies = (
        *check_counters(contents, counters),
        *check_replay_indexes(contents),
        *check_replay_rules(contents, config),
        *check_fresh(contents, config),
    )
    return Audit(len(contents.payload), len(contents.groups), counters, discrepancies)


def check_counters(contents: Contents, counters: Counters) -> Iterator[str]:
    """All that was accepted is stored, or was counted as it left."""
    replay = len(contents.payload) + sum(getattr(counters, name) for name in LEAVING_REPLAY)
    if counters.offered != replay:
        yield f"{counters.offered} trajectories offered, {replay} stored or counted as gone"
    fresh = len(contents.groups) + sum(getattr(counters, name) for name in LEAVING_FRESH)
    if counters.groups_accepted != fresh:
        yield f"{counters.groups_accepted} groups accepted, {fresh} waiting or counted as gone"
    for what, tally, counted in (
        ("duplicates", contents.duplicates, counters.duplicates),
        ("near-duplicates replaced", contents.near_replaced, counters.near_replaced),
    ):
        if (attributed := sum(tally.values())) > counted:
            yield f"{attributed} {what} are put down to items, {counted} happened"


def check_replay_indexes(contents: Contents) -> Iterator[str]:
    """Payloads, the global ranking and the rankings of the prompts hold the same items."""
    expected = {
        (id, prompt): advantage
        for prompt, items in contents.prompts.items()
        for id, advantage in advantages(items).items()
    }
    if expected != contents.priority:
        differing = expected.items() ^ contents.priority.items()
        yield f"the ranking and the prompts differ in {len(differing)} entries"
    ranked = {id for id, _ in contents.priority}
    if ranked != contents.payload.keys():
        differing_ids = ranked ^ contents.payload.keys()
        yield f"{len(differing_ids)} ids have a rank or a payload, but not both"
    for what, tally in (
        ("draws", contents.sampled),
        ("duplicates", contents.duplicates),
        ("near-duplicates replaced", contents.near_replaced),
    ):
        if strays := tally.keys() - contents.payload.keys():
            yield f"{len(strays)} counts of {what} belong to nothing stored"


def check_replay_rules(contents: Contents, config: BufferConfig) -> Iterator[str]:
    """Every payload is what its index says, and every prompt keeps its rules."""
    if len(contents.payload) > config.capacity:
        yield f"{len(contents.payload)} trajectories exceed the capacity {config.capacity}"
    for prompt, items in contents.prompts.items():
        if len(items) > config.quota_per_prompt:
            yield f"prompt {prompt!r} has {len(items)} items, quota {config.quota_per_prompt}"
        readable: list[Trajectory] = []
        for id, score in items.items():
            try:
                trajectory = unpack(contents.payload.get(id, b""))
            except MalformedTrajectory as error:
                yield f"payload of {id} is unreadable: {error}"
                continue
            readable.append(trajectory)
            found = (trajectory.id, trajectory.prompt_key, trajectory.terminal_log_reward)
            if found != (id, prompt, score):
                yield f"payload of {(id, prompt, score)} is that of {found}"
        completions = [trajectory.completion for trajectory in readable]
        near = near_duplicates(completions, completions, tolerance=config.near_duplicate_tolerance)
        if num_near := int(np.triu(near, 1).sum()):
            yield f"prompt {prompt!r} has {num_near} pairs of near-duplicates"


def check_fresh(contents: Contents, config: BufferConfig) -> Iterator[str]:
    """Waiting groups are readable, ranked by their version, and drawn no more than allowed."""
    if contents.fresh.keys() != contents.groups.keys():
        yield f"{len(contents.fresh.keys() ^ contents.groups.keys())} groups lack rank or payload"
    if contents.fresh.keys() - contents.draws.keys() != contents.undrawn:
        yield "the undrawn groups are not those that wait without a draw"
    if len(contents.groups) > config.fresh_capacity:
        yield f"{len(contents.groups)} groups exceed fresh_capacity {config.fresh_capacity}"
    for number, draws in contents.draws.items():
        if number not in contents.groups or draws >= config.max_draws:
            yield f"group {number} was drawn {draws} times and still has a count"
    for number, payload in contents.groups.items():
        try:
            version = min(trajectory.policy_version for trajectory in unpack_group(payload))
        except MalformedTrajectory as error:
            yield f"group {number} is unreadable: {error}"
            continue
        if contents.fresh.get(number) != version:
            found = contents.fresh.get(number)
            yield f"group {number} of version {version} ranks as {found}"
