"""Recounts a replay buffer from its data, trusting no index and no counter of its own.

    python -m bench.audit RUN

says whether accepted = stored + evicted + rejected by rule holds in a run.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from buffer.admission import advantages, near_duplicates
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.memory import MemoryStore
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.stats import LEAVING_FRESH, LEAVING_REPLAY, Counters
from buffer.store import Store
from buffer.trajectory import MalformedTrajectory, Trajectory, unpack, unpack_group
from cluster.config.file import load_config
from cluster.inspector.keeper import BufferKeeper
from cluster.run.directory import find_run

_ID_LENGTH = 32


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


def audit_buffer(buffer: ReplayBuffer) -> Audit:
    """Recount everything; reads the whole buffer."""
    return audit_contents(contents_of(buffer.store), buffer.config)


def contents_of(store: Store) -> Contents:
    """All that a store of either kind holds, as of one instant."""
    if isinstance(store, RedisStore):
        return _read(store)
    assert isinstance(store, MemoryStore)
    return _saved(store)


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


def _read(store: RedisStore) -> Contents:
    answer = store.call("snapshot")
    meta, payload, priority, fresh, undrawn, groups, draws, *tallies, prompts = answer
    sampled, duplicates, near_replaced = map(_numbers, tallies)
    return Contents(
        meta=_numbers(meta),
        payload={id.decode(): data for id, data in _by_two(payload)},
        priority={
            (member[:_ID_LENGTH].decode(), member[_ID_LENGTH:].decode()): float(score)
            for member, score in _by_two(priority)
        },
        prompts={
            prompt.decode(): {id.decode(): float(score) for id, score in _by_two(items)}
            for prompt, items in _by_two(prompts)
        },
        sampled=sampled,
        duplicates=duplicates,
        near_replaced=near_replaced,
        groups={int(seq): data for seq, data in _by_two(groups)},
        fresh={int(seq): int(version) for seq, version in _by_two(fresh)},
        undrawn=frozenset(int(seq) for seq, _ in _by_two(undrawn)),
        draws={int(seq): int(count) for seq, count in _by_two(draws)},
    )


def _saved(store: MemoryStore) -> Contents:
    """Of what it saves beside a checkpoint; its ranking is made anew whenever it is needed."""
    _, *values = msgpack.unpackb(store.save(), strict_map_key=False)
    meta, prompts, payload, _, sampled, duplicates, near_replaced, groups, fresh, draws = values[
        :10
    ]
    return Contents(
        meta=meta,
        payload=payload,
        priority={
            (id, prompt): advantage
            for prompt, items in prompts.items()
            for id, advantage in advantages(items).items()
        },
        prompts=prompts,
        sampled=sampled,
        duplicates={id: count for id, count in duplicates.items() if count},
        near_replaced={id: count for id, count in near_replaced.items() if count},
        groups=groups,
        fresh=fresh,
        undrawn=frozenset(fresh.keys() - draws.keys()),
        draws=draws,
    )


def _by_two(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _numbers(flat: Sequence[bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in _by_two(flat)}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where something does not add up."""
    parser = argparse.ArgumentParser(description="Recounts the replay buffer of a run.")
    parser.add_argument("run", help="name of a run, which may have ended")
    directory = find_run(parser.parse_args(arguments).run)
    config = load_config(str(directory.config_file))
    with BufferKeeper(config, directory) as keeper:
        url, password = keeper.address
        with connect(url, password=password, timeout_s=config.buffer.timeout_s) as client:
            store = RedisStore(client, run=directory.name)
            found = audit_buffer(ReplayBuffer(store, config=config.buffer))
    print(f"{found.replay_size} trajectories, {found.fresh_groups} groups; {found.counters}")
    print("\n".join(found.discrepancies) or "all that was accepted is accounted for")
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
