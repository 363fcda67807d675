"""One rule of the replay buffer each, on a real redis-server and in memory."""

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.audit import audit_buffer
from buffer.admission import Item, lengths_near
from buffer.config import BufferConfig
from buffer.memory import ForeignSave, MemoryStore
from buffer.replay import BufferStarved, ReplayBuffer
from buffer.store import Reader
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


def new_buffer(make_store: MakeStore, config: BufferConfig = SMALL) -> ReplayBuffer:
    return ReplayBuffer(make_store(), config=config)


def draw_fresh(
    buffer: ReplayBuffer, num_groups: int, version: int = 0
) -> list[tuple[Trajectory, ...]]:
    return [group.fresh for group in buffer.draw(toy_request(num_groups, version=version))]


# --- one rule each


def test_a_group_keeps_its_duplicates_where_replay_keeps_one(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    counts = buffer.add([toy_trajectory((1, 2))] * 3).counts
    assert (counts["offered"], counts["duplicates"]) == (3, 2)
    assert [len(group) for group in draw_fresh(buffer, 1)] == [3]
    assert len(replay_of(buffer)) == 1


def test_the_newest_payload_of_a_duplicate_wins(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    buffer.add([toy_trajectory((1, 2), actor="old")])
    buffer.add([toy_trajectory((1, 2), actor="new", log_reward=-7.0)])
    (stored,) = replay_of(buffer)
    assert (stored.actor, stored.terminal_log_reward) == ("new", -7.0)
    assert audit_buffer(buffer).ok


def test_a_better_near_duplicate_replaces_all_that_are_near_it(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    middle = [1] * 10
    left, right = [2, 2, *middle[2:]], [*middle[:8], 3, 3]  # near the middle, not each other
    buffer.add([toy_trajectory(left, log_reward=-3.0), toy_trajectory(right, log_reward=-4.0)])
    worse = buffer.add([toy_trajectory(middle, log_reward=-3.5)])
    assert worse.counts["near_rejected"] == 1
    better = buffer.add([toy_trajectory(middle, log_reward=-2.0)])
    assert better.counts["near_replaced"] == 2
    assert [t.completion.tolist() for t in replay_of(buffer)] == [middle]


def test_seeding_changes_nothing_that_is_stored(make_store: MakeStore) -> None:
    config = BufferConfig(quota_per_prompt=3, capacity=4)
    buffer = new_buffer(make_store, config)
    sampled = toy_trajectory([1] * 10, log_reward=-3.0)
    buffer.add([sampled, toy_trajectory((5, 6), log_reward=-9.0)])
    buffer.add([toy_trajectory((1,), prompt="q", log_reward=-50.0)])
    before = [(t.id, t.actor, t.terminal_log_reward) for t in replay_of(buffer)]
    again = replace(sampled, actor="data", behaviour="demonstration")
    near = toy_trajectory([1] * 9 + [2], log_reward=0.0, actor="data")
    counts = buffer.seed([again, near])
    assert (counts["offered"], counts["duplicates"], counts["near_rejected"]) == (1, 0, 1)
    assert [(t.id, t.actor, t.terminal_log_reward) for t in replay_of(buffer)] == before
    # What is new enters while there is room: one more in all, then no more.
    new = [toy_trajectory((n,) * 3, log_reward=1.0 + n, actor="data") for n in (7, 8, 9)]
    assert buffer.seed(new)["evicted_quota"] == 2
    kept = {t.id for t in replay_of(buffer)}
    assert kept == {id for id, _, _ in before} | {new[2].id}
    counts = buffer.seed([toy_trajectory((4,), prompt="r", log_reward=9.0)])
    assert counts["evicted_capacity"] == 1
    assert {t.id for t in replay_of(buffer)} == kept
    audit = audit_buffer(buffer)
    assert audit.ok, audit.discrepancies


def test_want_of_room_leaves_every_prompt_its_best_however_low(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store, BufferConfig(capacity=4))
    buffer.add([toy_trajectory((n,) * 4, prompt="low", log_reward=-60.0 - n) for n in range(3)])
    rewards = {"high": (-20.0, -21.5, -27.0), "other": (-19.0, -21.5)}
    for prompt, values in rewards.items():
        buffer.add(
            [toy_trajectory((n,) * 4, prompt=prompt, log_reward=v) for n, v in enumerate(values)]
        )
    kept = [(t.prompt_key, t.terminal_log_reward) for t in replay_of(buffer)]
    # The best of each, and the one that is nearest to it: 1 nat, where others lack 1.5 and 2.5.
    assert sorted(kept) == [("high", -20.0), ("low", -61.0), ("low", -60.0), ("other", -19.0)]
    buffer.add([toy_trajectory((9,) * 4, prompt="low", log_reward=-59.0)])
    kept = [(t.prompt_key, t.terminal_log_reward) for t in replay_of(buffer)]
    assert sorted(kept) == [("high", -20.0), ("low", -60.0), ("low", -59.0), ("other", -19.0)]
    audit = audit_buffer(buffer)
    assert audit.ok, audit.discrepancies


def test_more_prompts_than_capacity_are_kept_within_it(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store, BufferConfig(capacity=2))
    for prompt in "pqr":
        buffer.add([toy_trajectory((1,), prompt=prompt)])
    assert buffer.stats().replay_size == 2
    assert audit_buffer(buffer).ok


def test_the_freshest_version_is_drawn_first_and_the_old_expire(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    for version in (3, 5, 4):
        buffer.add([toy_trajectory((version,), policy_version=version)])
    (first,) = draw_fresh(buffer, 1, version=5)
    assert first[0].policy_version == 5
    draw_fresh(buffer, 1, version=7)  # max_age 2: version 3 and 4 expire, 5 is drawn again
    assert (buffer.stats().counters.groups_expired, buffer.stats().fresh_groups) == (2, 0)
    late = buffer.add([toy_trajectory((9,), policy_version=4)])
    assert late.fate == "expired"
    assert buffer.depth() == 0


def test_the_newest_group_can_be_looked_at_and_goes_on_waiting(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    assert buffer.newest() == ()
    for version, actor in ((1, "a"), (2, "b"), (2, "c"), (0, "d")):
        buffer.add([toy_trajectory((version, 2), actor=actor, policy_version=version)])
    (seen,) = buffer.newest()
    assert (seen.actor, seen.policy_version) == ("c", 2)
    before = buffer.stats()
    buffer.newest()
    assert buffer.stats() == before and buffer.depth() == 4


def test_where_no_group_waits_the_newest_of_a_prompt_are_looked_at(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    late = toy_trajectory((1, 2), log_reward=-9.0, created_s=3.0)
    early = toy_trajectory((8, 9, 10), created_s=2.0)
    buffer.seed([late, early])
    assert [seen.id for seen in buffer.newest()] == [late.id, early.id]


def test_the_same_group_sent_twice_counts_once(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    group = [toy_trajectory((1,)), toy_trajectory((2, 2))]
    assert buffer.add(group).fate == "queued"
    assert buffer.add(group).fate == "repeated"
    assert buffer.depth() == 1
    assert buffer.stats().counters.offered == 2
    assert audit_buffer(buffer).ok


def test_a_group_of_two_prompts_is_refused(make_store: MakeStore) -> None:
    with pytest.raises(ValueError, match="exactly one prompt"):
        new_buffer(make_store).add([toy_trajectory(prompt="p"), toy_trajectory(prompt="q")])


def test_ages_are_counted_from_the_last_draw(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store, BufferConfig(max_draws=9))
    for version in (4, 6):
        buffer.add([toy_trajectory((version,), policy_version=version)])
    draw_fresh(buffer, 1, version=8)
    stats = buffer.stats()
    assert (stats.version, stats.age_mean_versions, stats.age_max_versions) == (8, 3.0, 4)
    assert (stats.fresh_groups, stats.undrawn_groups, stats.replay_prompts) == (2, 1, 1)


# --- waiting


def test_starving_says_how_many_of_what_and_for_how_long(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    buffer.add([toy_trajectory()])
    with pytest.raises(
        BufferStarved, match=r"1 of 3 fresh groups .* version 0 after \d+\.\d s .*1 accepted"
    ):
        buffer.draw(toy_request(3, timeout_s=0.1))
    assert buffer.depth() == 1, "a draw that fails takes nothing"


def test_a_draw_that_can_never_be_filled_is_refused_at_once(make_store: MakeStore) -> None:
    with pytest.raises(ValueError, match=r"buffer\.fresh_capacity"):
        draw_fresh(new_buffer(make_store), 5)


def test_a_waiting_draw_goes_on_as_soon_as_enough_has_come(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    adder = threading.Timer(0.1, lambda: buffer.add([toy_trajectory()]))
    adder.start()
    groups = buffer.draw(toy_request(timeout_s=30.0))
    adder.join()
    assert len(groups) == 1


def test_a_waiting_draw_ends_when_it_is_stopped(make_store: MakeStore) -> None:
    buffer = new_buffer(make_store)
    buffer.add([toy_trajectory()])
    answers = iter([False, True])
    stopped = buffer.draw(toy_request(2, timeout_s=30.0, stop=lambda: next(answers)))
    assert stopped == [] and next(answers, None) is None
    # Who need not wait is not asked.
    assert len(buffer.draw(toy_request(stop=lambda: True))) == 1


# --- many writers


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads of this process meet as often as those of many."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def test_writers_of_one_prompt_never_break_a_rule(
    make_store: MakeStore, switching_often: None
) -> None:
    config = BufferConfig(quota_per_prompt=6, capacity=10, fresh_capacity=200)
    run, conflicts, gate = uuid4().hex, [], threading.Barrier(4)

    def write(writer: int) -> None:
        buffer = ReplayBuffer(make_store(run), config=config)
        rng = np.random.default_rng(writer)
        gate.wait(timeout=10.0)
        for i in range(12):
            group = [
                toy_trajectory(
                    rng.integers(0, 3, 6).tolist(),
                    prompt="pq"[i % 2],
                    log_reward=float(-rng.integers(0, 9)),
                    actor=f"actor-{writer}",
                    created_s=float(i),
                )
                for _ in range(4)
            ]
            conflicts.append(buffer.add(group).conflicts)

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join(timeout=60.0)
    audit = audit_buffer(ReplayBuffer(make_store(run), config=config))
    assert audit.ok, audit.discrepancies
    assert (audit.counters.groups_accepted, audit.counters.offered) == (48, 192)
    assert sum(conflicts) > 0, "the writers never met: the test shows nothing"


def test_an_eviction_between_reading_and_writing_makes_the_plan_anew(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = uuid4().hex, BufferConfig(capacity=2)
    ours, theirs = (ReplayBuffer(make_store(run), config=config) for _ in range(2))
    ours.add([toy_trajectory((1,), log_reward=-2.0), toy_trajectory((2, 2, 2), log_reward=-1.0)])
    read = Reader.prompt

    def read_then_lose_it(
        reader: Reader, prompt: str, lengths: tuple[int, int]
    ) -> tuple[int, list[Item]]:
        found = read(reader, prompt, lengths)
        if prompt == "p" and len(found[1]) == 2:
            theirs.add([toy_trajectory((2,), prompt="q", log_reward=-1.0)])
        return found

    monkeypatch.setattr(Reader, "prompt", read_then_lose_it)
    report = ours.add([toy_trajectory((1,), prompt="p", log_reward=0.0)])
    counts = report.counts
    assert (report.conflicts, counts["duplicates"], counts["evicted_capacity"]) == (1, 0, 1)
    audit = audit_buffer(ours)
    assert audit.ok, audit.discrepancies


def test_only_completions_whose_length_matters_are_read(make_store: MakeStore) -> None:
    store = make_store(uuid4().hex)
    group = [
        toy_trajectory(range(n), log_reward=-n, answer=np.full(n, 9, np.int32))
        for n in (1, 30, 300)
    ]
    ReplayBuffer(store, config=BufferConfig()).add(group)
    whole = [(each.id, each.completion.tobytes()) for each in reversed(group)]
    for lengths in ((0, 300), (1, 30), (2, 29), (300, 300), (1, 0)):
        revision, items = store.read_completions("p", *lengths)
        assert revision == store.read_completions("p", 0, 300)[0]
        within = [lengths[0] <= len(data) // 4 <= lengths[1] for _, data in whole]
        assert [(id, data) for id, _, data in items] == [
            (id, data if inside else b"") for (id, data), inside in zip(whole, within, strict=True)
        ]


@given(length=st.integers(0, 60), other=st.integers(0, 60), tolerance=st.floats(0.01, 0.99))
def test_lengths_that_are_not_read_are_those_that_cannot_be_near(
    length: int, other: int, tolerance: float
) -> None:
    shortest, longest = lengths_near([length], tolerance=tolerance)
    if not shortest <= other <= longest:
        assert abs(length - other) >= tolerance * (length + other) - 1e-9


def test_two_runs_on_one_server_do_not_meet(make_store: MakeStore) -> None:
    ours, theirs = new_buffer(make_store), new_buffer(make_store)
    ours.add([replace(toy_trajectory(), actor="ours")])
    assert (ours.depth(), theirs.depth()) == (1, 0)
    assert replay_of(theirs) == []


def test_a_buffer_in_memory_is_carried_over_whole() -> None:
    store = MemoryStore()
    buffer = ReplayBuffer(store, config=SMALL)
    for version in (1, 2):
        buffer.add([toy_trajectory((version,) * n, policy_version=version) for n in (1, 4, 4)])
    buffer.draw(toy_request(num_replayed=2, version=2))
    carried = MemoryStore()
    carried.restore(store.save())
    assert carried.save() == store.save()
    later = ReplayBuffer(carried, config=SMALL)
    assert later.stats() == buffer.stats() and audit_buffer(later).ok
    for both in (buffer, later):
        both.add([toy_trajectory((5, 6), policy_version=2)])
    drawn, again = (
        [t.id for group in each.draw(toy_request(2, version=2)) for t in group.fresh]
        for each in (buffer, later)
    )
    assert drawn == again and carried.save() == store.save()


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"\x93\x09\x01\x02", "format 9"), (b"", "no bytes of a saved"), (b"\x01", "no bytes of")],
)
def test_a_saved_buffer_of_another_kind_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ForeignSave, match=why):
        MemoryStore().restore(data)
