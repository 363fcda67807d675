"""One rule of the replay buffer each, on a real redis-server."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import redis

from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.reader import Reader, StoredPrompt
from buffer.replay import BufferStarved, ReplayBuffer
from buffer.server import RedisServer
from buffer.trajectory import Trajectory
from tests.buffer_toy import serving, toy_trajectory

SMALL = BufferConfig(
    capacity=9,
    quota_per_prompt=4,
    near_duplicate_tolerance=0.2,
    fresh_capacity=4,
    max_draws=2,
    max_age=2,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, redis.Redis]]:
    with serving(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[RedisServer, redis.Redis]) -> redis.Redis:
    return server[1]


def new_buffer(client: redis.Redis, config: BufferConfig = SMALL) -> ReplayBuffer:
    return ReplayBuffer(client, run=uuid4().hex, config=config)


def draw_fresh(
    buffer: ReplayBuffer, num_groups: int, version: int = 0
) -> list[tuple[Trajectory, ...]]:
    rng = np.random.default_rng(0)
    groups = buffer.draw(
        num_groups=num_groups, num_replayed=0, version=version, rng=rng, timeout_s=0.0
    )
    return [group.fresh for group in groups]


# --- one rule each


def test_a_group_keeps_its_duplicates_where_replay_keeps_one(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    report = buffer.add([toy_trajectory((1, 2))] * 3)
    assert (report.offered, report.duplicates) == (3, 2)
    assert [len(group) for group in draw_fresh(buffer, 1)] == [3]
    assert len(list(buffer.trajectories())) == 1


def test_the_newest_payload_of_a_duplicate_wins(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    buffer.add([toy_trajectory((1, 2), actor="old")])
    buffer.add([toy_trajectory((1, 2), actor="new", log_reward=-7.0)])
    (stored,) = buffer.trajectories()
    assert (stored.actor, stored.terminal_log_reward) == ("new", -7.0)
    assert buffer.audit().ok


def test_a_better_near_duplicate_replaces_all_that_are_near_it(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    middle = [1] * 10
    left, right = [2, 2, *middle[2:]], [*middle[:8], 3, 3]  # near the middle, not each other
    buffer.seed([toy_trajectory(left, log_reward=-3.0), toy_trajectory(right, log_reward=-4.0)])
    worse = buffer.seed([toy_trajectory(middle, log_reward=-3.5)])
    assert worse.near_rejected == 1
    better = buffer.seed([toy_trajectory(middle, log_reward=-2.0)])
    assert better.near_replaced == 2
    assert [t.completion.tolist() for t in buffer.trajectories()] == [middle]


def test_the_freshest_version_is_drawn_first_and_the_old_expire(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    for version in (3, 5, 4):
        buffer.add([toy_trajectory((version,), policy_version=version)])
    (first,) = draw_fresh(buffer, 1, version=5)
    assert first[0].policy_version == 5
    draw_fresh(buffer, 1, version=7)  # max_age 2: version 3 and 4 expire, 5 is drawn again
    assert (buffer.stats().counters.groups_expired, buffer.stats().fresh_groups) == (2, 0)
    late = buffer.add([toy_trajectory((9,), policy_version=4)])
    assert late.expired and not late.queued
    assert buffer.depth() == 0


def test_the_same_group_sent_twice_counts_once(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    group = [toy_trajectory((1,)), toy_trajectory((2, 2))]
    assert buffer.add(group).queued
    assert buffer.add(group).repeated
    assert buffer.depth() == 1
    assert buffer.stats().counters.offered == 2
    assert buffer.audit().ok


def test_a_group_of_two_prompts_is_refused(client: redis.Redis) -> None:
    with pytest.raises(ValueError, match="exactly one prompt"):
        new_buffer(client).add([toy_trajectory(prompt="p"), toy_trajectory(prompt="q")])


def test_ages_are_counted_from_the_last_draw(client: redis.Redis) -> None:
    buffer = new_buffer(client, BufferConfig(max_draws=9))
    for version in (4, 6):
        buffer.add([toy_trajectory((version,), policy_version=version)])
    draw_fresh(buffer, 1, version=8)
    stats = buffer.stats()
    assert (stats.version, stats.age_mean_versions, stats.age_max_versions) == (8, 3.0, 4)
    assert (stats.fresh_groups, stats.undrawn_groups, stats.replay_prompts) == (2, 1, 1)


# --- waiting


def test_starving_says_how_many_of_what_and_for_how_long(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    buffer.add([toy_trajectory()])
    rng = np.random.default_rng(0)
    with pytest.raises(
        BufferStarved, match=r"1 of 3 fresh groups .* version 0 after \d+\.\d s .*1 accepted"
    ):
        buffer.draw(num_groups=3, num_replayed=0, version=0, rng=rng, timeout_s=0.1)
    assert buffer.depth() == 1, "a draw that fails takes nothing"


def test_a_draw_that_can_never_be_filled_is_refused_at_once(client: redis.Redis) -> None:
    with pytest.raises(ValueError, match=r"buffer\.fresh_capacity"):
        draw_fresh(new_buffer(client), 5)


def test_a_waiting_draw_goes_on_as_soon_as_enough_has_come(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    adder = threading.Timer(0.1, lambda: buffer.add([toy_trajectory()]))
    adder.start()
    rng = np.random.default_rng(0)
    groups = buffer.draw(num_groups=1, num_replayed=0, version=0, rng=rng, timeout_s=30.0)
    adder.join()
    assert len(groups) == 1


def test_a_waiting_draw_ends_when_it_is_stopped(client: redis.Redis) -> None:
    buffer = new_buffer(client)
    buffer.add([toy_trajectory()])
    answers = iter([False, True])
    limits: dict[str, Any] = {"num_replayed": 0, "version": 0, "rng": np.random.default_rng(0)}
    stopped = buffer.draw(num_groups=2, timeout_s=30.0, stop=lambda: next(answers), **limits)
    assert stopped == [] and next(answers, None) is None
    # Who need not wait is not asked.
    assert len(buffer.draw(num_groups=1, timeout_s=0.0, stop=lambda: True, **limits)) == 1


# --- many writers


def test_writers_of_one_prompt_never_break_a_rule(
    server: tuple[RedisServer, redis.Redis], client: redis.Redis
) -> None:
    config = BufferConfig(quota_per_prompt=6, capacity=10, fresh_capacity=200)
    run, conflicts, gate = uuid4().hex, [], threading.Barrier(4)

    def write(writer: int) -> None:
        with connect(server[0].url, password=server[0].password, timeout_s=10.0) as own:
            buffer = ReplayBuffer(own, run=run, config=config)
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
    audit = ReplayBuffer(client, run=run, config=config).audit()
    assert audit.ok, audit.discrepancies
    assert (audit.counters.groups_accepted, audit.counters.offered) == (48, 192)
    assert sum(conflicts) > 0, "the writers never met: the test shows nothing"


def test_an_eviction_between_reading_and_writing_makes_the_plan_anew(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = uuid4().hex, BufferConfig(capacity=1)
    ours, theirs = (ReplayBuffer(client, run=run, config=config) for _ in range(2))
    ours.seed([toy_trajectory((1,), prompt="p", log_reward=-2.0)])
    read = Reader.prompt

    def read_then_lose_it(reader: Reader, prompt: str) -> StoredPrompt:
        found = read(reader, prompt)
        if prompt == "p" and found.trajectories:
            theirs.seed([toy_trajectory((2,), prompt="q", log_reward=-1.0)])
        return found

    monkeypatch.setattr(Reader, "prompt", read_then_lose_it)
    report = ours.seed([toy_trajectory((1,), prompt="p", log_reward=0.0)])
    assert (report.conflicts, report.duplicates, report.evicted_capacity) == (1, 0, 1)
    audit = ours.audit()
    assert audit.ok, audit.discrepancies


def test_two_runs_on_one_server_do_not_meet(client: redis.Redis) -> None:
    ours, theirs = new_buffer(client), new_buffer(client)
    ours.add([replace(toy_trajectory(), actor="ours")])
    assert (ours.depth(), theirs.depth()) == (1, 0)
    assert list(theirs.trajectories()) == []
