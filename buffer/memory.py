"""The store of a run in one process: plain dicts, under the same contract as Redis's."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from threading import RLock

import msgpack

from buffer.admission import Plan, advantages
from buffer.config import BufferConfig
from buffer.stats import ReplayStats, summarise
from buffer.store import KEPT_EVIDENCE, REMEMBERED_GROUPS, Arrival, Commit, Drawn, Stored
from buffer.trajectory import MalformedTrajectory, unpack

FORMAT = 1


class ForeignSave(ValueError):
    """Saved bytes of a buffer are of another format, or none at all."""


@dataclass(slots=True)
class _State:
    """All that is stored, in the shape that msgpack keeps it in."""

    meta: Counter[str] = field(default_factory=Counter)  # counters, and the learner's last version
    prompts: dict[str, dict[str, float]] = field(default_factory=dict)  # log-rewards by id
    payload: dict[str, bytes] = field(default_factory=dict)  # by id
    revision: Counter[str] = field(default_factory=Counter)  # by prompt
    sampled: Counter[str] = field(default_factory=Counter)  # by id
    duplicates: Counter[str] = field(default_factory=Counter)  # by id
    near_replaced: Counter[str] = field(default_factory=Counter)  # by id
    groups: dict[int, bytes] = field(default_factory=dict)  # by arrival number
    fresh: dict[int, int] = field(default_factory=dict)  # arrival number -> policy version
    draws: Counter[int] = field(default_factory=Counter)  # by arrival number
    accepted: dict[str, int] = field(default_factory=dict)  # digest -> arrival number, in order
    quarantine: dict[str, bytes] = field(default_factory=dict)


class MemoryStore:
    """A `Store` that lives and dies with its process; `save` and `restore` carry it across."""

    place = "this process"

    def __init__(self) -> None:
        self._state = _State()
        self._lock = RLock()

    def restore(self, data: bytes) -> None:
        """Hold what `save` gave, and nothing else; raises ForeignSave."""
        try:
            version, *values = msgpack.unpackb(data, strict_map_key=False)
        except (ValueError, TypeError) as error:
            raise ForeignSave(f"these are no bytes of a saved buffer: {error!r:.200}") from error
        if version != FORMAT or len(values) != len(fields(_State)):
            raise ForeignSave(f"the saved buffer has format {version!r}, not {FORMAT}: start anew")
        with self._lock:
            self._state = _State()
            for entry, value in zip(fields(_State), values, strict=True):
                getattr(self._state, entry.name).update(value)

    def save(self) -> bytes:
        """All of it, as of one instant."""
        with self._lock:
            values = [dict(getattr(self._state, entry.name)) for entry in fields(_State)]
            return msgpack.packb([FORMAT, *values])

    def commit(self, plan: Plan, arrival: Arrival | None, limits: BufferConfig) -> Commit:
        with self._lock:
            state, prompt = self._state, plan.prompt
            if arrival is not None and arrival.digest in state.accepted:
                return Commit("repeated")
            if state.revision[prompt] != plan.revision:
                return Commit("conflict")
            for id in plan.removed:
                self._forget_item(id, prompt)
            for item, duplicates, near_replaced in plan.put:
                state.payload[item.id] = item.payload
                state.prompts.setdefault(prompt, {})[item.id] = item.log_reward
                state.revision[prompt] += 1
                state.duplicates[item.id] += duplicates
                state.near_replaced[item.id] += near_replaced
            evicted = self._evict(plan, limits.capacity)
            state.meta.update(plan.counts, evicted_capacity=evicted)
            if arrival is None:
                return Commit("none", evicted)
            return Commit("queued" if self._queue(arrival, limits) else "expired", evicted)

    def draw(self, num_groups: int, version: int, limits: BufferConfig) -> Drawn:
        with self._lock:
            state = self._state
            state.meta["version"] = version
            for number in [n for n, v in state.fresh.items() if version - v > limits.max_age]:
                self._forget_group(number)
                state.meta["groups_expired"] += 1
            eligible = len(state.fresh)
            if eligible < num_groups:
                return eligible, []
            freshest = sorted(state.fresh, key=lambda n: (state.fresh[n], n), reverse=True)
            drawn = [(number, state.groups[number]) for number in freshest[:num_groups]]
            for number, _ in drawn:
                state.draws[number] += 1
                if state.draws[number] >= limits.max_draws:
                    self._forget_group(number)
                    state.meta["groups_exhausted"] += 1
            state.meta["groups_drawn"] += num_groups
            return eligible, drawn

    def read_completions(self, prompt: str, shortest: int, longest: int) -> Stored:
        with self._lock:
            return self._state.revision[prompt], [
                (id, score, completion(self._state.payload.get(id), shortest, longest))
                for id, score in self._ranked(prompt)
            ]

    def rank(self, prompts: Sequence[str]) -> list[list[tuple[str, float]]]:
        with self._lock:
            return [self._ranked(prompt) for prompt in prompts]

    def fetch(self, ids: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            self._state.sampled.update(id for id in ids if id in self._state.payload)
            return [self._state.payload.get(id) for id in ids]

    def peek(self, ids: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            return [self._state.payload.get(id) for id in ids]

    def quarantine_item(self, id: str, prompt: str) -> None:
        with self._lock:
            if id in self._state.prompts.get(prompt, {}):
                self._keep_evidence(f"item:{id}", self._state.payload.get(id, b""))
                self._forget_item(id, prompt)
                self._state.meta["quarantined"] += 1

    def quarantine_group(self, number: int, payload: bytes) -> None:
        with self._lock:
            if number not in self._state.fresh:  # its last draw has counted it as exhausted
                self._state.meta["groups_exhausted"] -= 1
            self._forget_group(number)
            self._state.meta["groups_quarantined"] += 1
            self._keep_evidence(f"group:{number}", payload)

    def newest_group(self) -> bytes | None:
        with self._lock:
            fresh = self._state.fresh
            newest = max(fresh, key=lambda number: (fresh[number], number), default=None)
            return None if newest is None else self._state.groups[newest]

    def depth(self) -> int:
        with self._lock:
            return len(self._state.fresh) - len(self._state.draws)

    def prompts(self) -> list[str]:
        with self._lock:
            return sorted(self._state.revision)

    def stats(self) -> ReplayStats:
        with self._lock:
            state = self._state
            sampled, versions = list(state.sampled.values()), list(state.fresh.values())
            sizes = (len(state.payload), len(state.revision))
            return summarise(state.meta, *sizes, sampled, versions, self.depth())

    def _ranked(self, prompt: str) -> list[tuple[str, float]]:
        items = self._state.prompts.get(prompt, {})
        return sorted(items.items(), key=lambda item: (item[1], item[0]))

    def _priorities(self) -> Iterator[tuple[float, str, str]]:
        """(advantage, id, prompt) of every item."""
        for prompt, items in self._state.prompts.items():
            for id, advantage in advantages(items).items():
                yield advantage, id, prompt

    def _evict(self, plan: Plan, capacity: int) -> int:
        """Make room; how many items went."""
        excess = len(self._state.payload) - capacity
        if excess <= 0:
            return 0
        if plan.keep_stored:
            victims = [(put.item.id, plan.prompt) for put in plan.put[-excess:]]
        else:
            victims = [(id, p) for _, id, p in heapq.nsmallest(excess, self._priorities())]
        for id, owner in victims:
            self._forget_item(id, owner)
        return len(victims)

    def _queue(self, arrival: Arrival, limits: BufferConfig) -> bool:
        """Let a group wait for the learner; False where it comes too late."""
        state = self._state
        state.meta["groups_accepted"] += 1
        number = state.meta["groups_accepted"]
        state.accepted[arrival.digest] = number
        if len(state.accepted) > REMEMBERED_GROUPS:
            del state.accepted[next(iter(state.accepted))]
        if state.meta.get("version", arrival.version) - arrival.version > limits.max_age:
            state.meta["groups_expired"] += 1
            return False
        state.groups[number], state.fresh[number] = arrival.payload, arrival.version
        while len(state.fresh) > limits.fresh_capacity:
            self._forget_group(min(state.fresh, key=lambda n: (state.fresh[n], n)))
            state.meta["groups_dropped"] += 1
        return True

    def _forget_item(self, id: str, prompt: str) -> None:
        state = self._state
        state.prompts[prompt].pop(id, None)
        state.payload.pop(id, None)
        for tally in (state.sampled, state.duplicates, state.near_replaced):
            tally.pop(id, None)
        state.revision[prompt] += 1

    def _forget_group(self, number: int) -> None:
        for column in (self._state.groups, self._state.fresh, self._state.draws):
            column.pop(number, None)

    def _keep_evidence(self, name: str, data: bytes) -> None:
        if len(self._state.quarantine) < KEPT_EVIDENCE:
            self._state.quarantine[name] = data


def completion(payload: bytes | None, shortest: int, longest: int) -> bytes | None:
    """Its tokens, as `Store.read_completions` gives them."""
    if shortest > longest:
        return b""
    try:
        tokens = unpack(payload or b"").completion
    except MalformedTrajectory:
        return None
    return tokens.tobytes() if shortest <= tokens.size <= longest else b""
