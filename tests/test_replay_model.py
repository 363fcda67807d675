"""The replay buffer on either store does what a plain model on dicts does."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from bench.audit import audit_buffer, contents_of
from buffer.admission import Item, Plan, Put, near_duplicates
from buffer.config import BufferConfig
from buffer.memory import MemoryStore
from buffer.replay import BufferStarved, Group, ReplayBuffer
from buffer.trajectory import Trajectory
from tests.buffer_toy import MakeStore, replay_of, toy_request, toy_trajectory

SMALL = BufferConfig(
    capacity=9,
    quota_per_prompt=4,
    near_duplicate_tolerance=0.2,
    fresh_capacity=4,
    max_draws=2,
    max_age=2,
)


@cache
def edit_distance(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Levenshtein distance by its definition."""
    if not left or not right:
        return len(left) + len(right)
    return min(
        edit_distance(left[1:], right) + 1,
        edit_distance(left, right[1:]) + 1,
        edit_distance(left[1:], right[1:]) + (left[0] != right[0]),
    )


@dataclass
class Model:
    """The rules on dicts and lists."""

    config: BufferConfig
    replay: dict[str, dict[str, tuple[tuple[int, ...], float]]] = field(default_factory=dict)
    fresh: list[tuple[int, int, list[str]]] = field(default_factory=list)  # version, number, ids
    draws: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)  # by id
    replaced: Counter[str] = field(default_factory=Counter)  # by id
    version: int | None = None

    def seed(self, group: Sequence[Trajectory]) -> None:
        """What is stored stays as it is; of the newcomers the rules hold among themselves."""
        items = self.replay.setdefault(group[0].prompt_key, {})
        fixed = dict(items)
        new = [t for t in group if t.id not in fixed]
        self.admit(new, fixed=fixed)

    def admit(
        self,
        group: Sequence[Trajectory],
        fixed: dict[str, tuple[tuple[int, ...], float]] | None = None,
    ) -> None:
        if not group:
            return
        items = self.replay.setdefault(group[0].prompt_key, {})
        seeding, fixed = fixed is not None, fixed or {}
        for trajectory in group:
            self.counts["offered"] += 1
            tokens, reward = tuple(trajectory.completion.tolist()), trajectory.terminal_log_reward
            near = [
                id
                for id, (other, _) in items.items()
                if edit_distance(tokens, other)
                < self.config.near_duplicate_tolerance * (len(tokens) + len(other))
            ]
            if trajectory.id in items:
                self.counts["duplicates"] += 1
                self.again[trajectory.id] += 1
                items[trajectory.id] = (tokens, reward)
            elif any(id in fixed or items[id][1] >= reward for id in near):
                self.counts["near_rejected"] += 1
            else:
                for id in near:
                    self.forget(items, id)
                    self.counts["near_replaced"] += 1
                    self.replaced[trajectory.id] += 1
                items[trajectory.id] = (tokens, reward)
                if len(items) > self.config.quota_per_prompt:
                    self.forget(items, min(items.keys() - fixed, key=lambda id: (items[id][1], id)))
                    self.counts["evicted_quota"] += 1
        while sum(map(len, self.replay.values())) > self.config.capacity:
            if seeding:  # the last to come go again
                self.forget(items, list(items)[-1])
                self.counts["evicted_capacity"] += 1
                continue
            ranked = [
                (r - max(s.values(), key=lambda item: item[1])[1], id + p, id, p)
                for p, s in self.replay.items()
                for id, (_, r) in s.items()
                if (r, id) != max((r, id) for id, (_, r) in s.items())
            ]
            _, _, id, prompt = min(ranked)  # three prompts, room for nine: never none
            self.forget(self.replay[prompt], id)
            self.counts["evicted_capacity"] += 1

    def forget(self, items: dict[str, tuple[tuple[int, ...], float]], id: str) -> None:
        del items[id], self.again[id], self.replaced[id]

    def queue(self, group: Sequence[Trajectory]) -> None:
        self.counts["groups_accepted"] += 1
        version = min(trajectory.policy_version for trajectory in group)
        if self.version is not None and self.version - version > self.config.max_age:
            self.counts["groups_expired"] += 1
            return
        number = self.counts["groups_accepted"]
        self.fresh = sorted([*self.fresh, (version, number, [t.id for t in group])])
        if len(self.fresh) > self.config.fresh_capacity:
            del self.fresh[0]
            self.counts["groups_dropped"] += 1

    def draw(self, num_groups: int, version: int) -> list[list[str]] | None:
        self.version = version
        alive = [group for group in self.fresh if version - group[0] <= self.config.max_age]
        self.counts["groups_expired"] += len(self.fresh) - len(alive)
        self.fresh = alive
        if len(alive) < num_groups:
            return None
        drawn = alive[::-1][:num_groups]
        for group in drawn:
            self.draws[group[1]] += 1
            self.counts["groups_drawn"] += 1
            if self.draws[group[1]] == self.config.max_draws:
                self.fresh.remove(group)
                self.counts["groups_exhausted"] += 1
        return [ids for _, _, ids in drawn]


def draw(buffer: ReplayBuffer, num_groups: int, version: int) -> list[Group]:
    return buffer.draw(toy_request(num_groups, version=version))


REWARDS = st.one_of(st.sampled_from([-2.0, -1.0, 0.0]), st.floats(-50, 50, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(REWARDS, min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_in_memory_the_lowest_by_a_plain_sort_make_room(
    rewards: list[list[float]], data: st.DataObject
) -> None:
    """That is, by log-reward less that of their prompt's best, which itself stays to the last."""
    store, size = MemoryStore(), sum(map(len, rewards))
    prompts = {f"p{p}": {f"{n}-{p}": r for n, r in enumerate(rs)} for p, rs in enumerate(rewards)}

    def put(prompt: str, capacity: int, **items: float) -> None:
        made = [Put(Item(id, np.zeros(1, np.int32), reward)) for id, reward in items.items()]
        change = Plan(prompt, 0, tuple(made), (), Counter(), False)
        assert store.commit(change, None, SMALL.model_copy(update={"capacity": capacity})).fate

    for prompt, items in prompts.items():
        put(prompt, size, **items)
    assert store.rank([*prompts]) == [
        sorted(items.items(), key=lambda item: (item[1], item[0])) for items in prompts.values()
    ]
    ranked = []
    for items in prompts.values():
        best = max(items, key=lambda id: (items[id], id))
        ranked += [
            (id == best, 0.0 if id == best else r - items[best], id) for id, r in items.items()
        ]
    room = data.draw(st.integers(1, size))
    put("another", room)
    kept = {id for items in store.rank([*prompts]) for id, _ in items}
    assert kept == {id for *_, id in sorted(ranked)[size - room :]}


TOKENS = st.lists(st.integers(0, 2), max_size=7)
GROUP = st.tuples(
    st.sampled_from("pqr"),
    st.lists(st.tuples(TOKENS, st.integers(-5, 0)), min_size=1, max_size=5),
    st.integers(0, 3),
)
STEP = st.one_of(
    st.tuples(st.just("add"), GROUP),
    st.tuples(st.just("add"), GROUP),
    st.tuples(st.just("seed"), GROUP),
    st.tuples(st.just("draw"), st.tuples(st.integers(1, 3), st.integers(0, 2))),
)


@settings(
    max_examples=25,
    deadline=None,
    # Shrinking against a real server would outlast the time limit of the test.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(STEP, min_size=8, max_size=25))
def test_any_sequence_of_calls_does_what_the_plain_model_does(
    make_store: MakeStore, steps: list[tuple[str, tuple]]
) -> None:
    model, version, serial = Model(SMALL), 0, itertools.count()
    run = uuid4().hex
    store = make_store(run)
    buffer = ReplayBuffer(store, config=SMALL)
    for action, detail in steps:
        if action == "draw":
            num_groups, later = detail
            version += later
            expected = model.draw(num_groups, version)
            if expected is None:
                with pytest.raises(BufferStarved):
                    draw(buffer, num_groups, version)
                continue
            found = draw(buffer, num_groups, version)
            assert [[t.id for t in group.fresh] for group in found] == expected
            continue
        prompt, members, age = detail
        group = [
            toy_trajectory(
                tokens,
                prompt=prompt,
                log_reward=reward,
                policy_version=max(0, version - age),
                created_s=float(next(serial)),  # what makes two groups of equal content two
            )
            for tokens, reward in members
        ]
        if action == "add":
            model.admit(group)
            model.queue(group)
            assert buffer.add(group).fate != "repeated"
        else:
            model.seed(group)
            buffer.seed(group)
    stored: dict[str, dict[str, float]] = {}
    for trajectory in replay_of(buffer):
        items = stored.setdefault(trajectory.prompt_key, {})
        items[trajectory.id] = trajectory.terminal_log_reward
    assert stored == {p: {id: r for id, (_, r) in s.items()} for p, s in model.replay.items() if s}
    contents = contents_of(store)
    assert (contents.duplicates, contents.near_replaced) == (+model.again, +model.replaced)
    audit = audit_buffer(buffer)
    assert audit.ok, audit.discrepancies
    names = audit.counters.__dataclass_fields__
    assert {name: getattr(audit.counters, name) for name in names} == {
        name: model.counts[name] for name in names
    }
    assert buffer.depth() == sum(not model.draws[number] for _, number, _ in model.fresh)


@pytest.mark.parametrize(("long", "buckets"), [(512, 4096), (0, 4096), (0, 2)])
@given(
    rows=st.lists(TOKENS, max_size=5),
    columns=st.lists(TOKENS, max_size=5),
    tolerance=st.sampled_from([0, 0.1, 0.3, 0.6]),
)
def test_near_means_what_the_definition_says(
    long: int, buckets: int, rows: list[list[int]], columns: list[list[int]], tolerance: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buffer.admission._LONG", long)
        patch.setattr("buffer.admission._BUCKETS", buckets)
        found = near_duplicates(
            [np.array(row, np.int32) for row in rows],
            [np.array(column, np.int32) for column in columns],
            tolerance=tolerance,
        )
    expected = [
        [edit_distance(tuple(r), tuple(c)) < tolerance * (len(r) + len(c)) for c in columns]
        for r in rows
    ]
    assert found.tolist() == expected


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), kept=st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_long_completions_are_near_by_their_edit_distance_too(seed: int, kept: float) -> None:
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, 50, 700, dtype=np.int32)
    others = [whole[rng.random(700) < kept], rng.permutation(whole), whole[: rng.integers(0, 700)]]
    found = near_duplicates([whole], others, tolerance=0.25)
    expected = [
        Levenshtein.distance(whole.tolist(), each.tolist()) < 0.25 * (700 + each.size)
        for each in others
    ]
    assert found.tolist() == [expected]
