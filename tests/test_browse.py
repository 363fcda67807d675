"""Looking at the replay buffer: the right figures, and nothing changed by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pytest
import redis

from bench.audit import audit_buffer
from buffer.browser import PORTION, ReplayBrowser, Summary, Tally
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import NeverServed, RedisServer, reach
from tests.buffer_toy import random_trajectory, replay_of, toy_request, toy_trajectory


def opened(client: redis.Redis, **settings: Any) -> tuple[ReplayBuffer, ReplayBrowser, str]:
    run = uuid4().hex
    buffer = ReplayBuffer(RedisStore(client, run=run), config=BufferConfig(**settings))
    return buffer, ReplayBrowser(client, run=run), run


def dumps(client: redis.Redis, run: str) -> dict[bytes, Any]:
    """Every key of a run with its serialised value."""
    keys = cast(list[bytes], client.keys(f"{{amortize:{run}}}:*"))
    return {key: client.dump(key) for key in keys}


def test_a_stored_trajectory_tells_how_often_it_came_was_drawn_and_replaced(
    client: redis.Redis,
) -> None:
    buffer, browser, _ = opened(client)
    poor, best = [1] * 9 + [2], [1] * 10
    buffer.add([toy_trajectory(poor, log_reward=-2.0), toy_trajectory(poor, log_reward=-2.0)])
    (stored,) = replay_of(buffer)
    assert browser.tallies() == {stored.id: Tally(duplicates=1)}
    buffer.add([toy_trajectory(best, log_reward=-1.0)] * 3)
    buffer.draw(toy_request(2, num_replayed=1))
    (kept,) = replay_of(buffer)
    assert browser.tallies() == {kept.id: Tally(draws=2, duplicates=2, near_replaced=1)}
    assert audit_buffer(buffer).ok


def test_what_an_evicted_trajectory_had_gathered_goes_with_it(client: redis.Redis) -> None:
    buffer, browser, _ = opened(client, quota_per_prompt=1)
    buffer.seed([toy_trajectory([1] * 9 + [2], log_reward=-3.0)])
    buffer.add([toy_trajectory([1] * 10, log_reward=-2.0)] * 2)
    buffer.draw(toy_request(num_replayed=1))
    assert list(browser.tallies().values()) == [Tally(draws=1, duplicates=1, near_replaced=1)]
    buffer.add([toy_trajectory((5, 6, 7, 8), log_reward=-1.0)])
    assert browser.tallies() == {}
    assert audit_buffer(buffer).ok


def test_tallies_are_those_of_the_ids_asked_for(client: redis.Redis) -> None:
    buffer, browser, _ = opened(client)
    buffer.seed([toy_trajectory((1, 2))] * 3)
    (stored,) = replay_of(buffer)
    unknown = "0" * 32
    expected = {stored.id: Tally(duplicates=2), unknown: Tally()}
    assert browser.tallies_of([stored.id, unknown]) == expected
    assert browser.tallies_of([]) == {}


def test_the_audit_finds_tallies_that_are_too_high_or_without_an_item(client: redis.Redis) -> None:
    buffer, _, run = opened(client)
    buffer.seed([toy_trajectory()])
    (stored,) = replay_of(buffer)
    client.hincrby(f"{{amortize:{run}}}:near_replaced", stored.id, 2)
    client.hset(f"{{amortize:{run}}}:duplicates", "f" * 32, "0")
    assert audit_buffer(buffer).discrepancies == (
        "2 near-duplicates replaced are put down to items, 0 happened",
        "1 counts of duplicates belong to nothing stored",
    )


def test_more_than_one_portion_is_read_whole(client: redis.Redis) -> None:
    buffer, browser, _ = opened(client)
    rng = np.random.default_rng(0)
    prompts = [f"p{number}" for number in range(PORTION + 50)]
    for prompt in prompts:
        buffer.seed([random_trajectory(rng, prompt=prompt), random_trajectory(rng, prompt=prompt)])
    assert browser.revisions().keys() == set(prompts)
    by_prompt = browser.ids(prompts)
    assert [len(ids) for ids in by_prompt] == [2] * len(prompts)
    ids = [id for ids in by_prompt for id in ids]
    assert [t.id for t in browser.trajectories(ids)] == ids
    assert {t.id for t in replay_of(buffer)} == set(ids)
    assert browser.stats().replay_size == len(ids)


@pytest.mark.parametrize("length", [0, 5, 60, 255, 2000, 20_000])  # blocks of bytes of all widths
def test_a_summary_says_what_the_whole_record_does(client: redis.Redis, length: int) -> None:
    buffer, browser, _ = opened(client, near_duplicate_tolerance=0.0)
    rng = np.random.default_rng(length)
    plain = toy_trajectory(rng.integers(0, 256, length).tolist(), log_reward=-1.25, correct=True)
    from_tool = np.arange(length + 1) == length // 2
    stops = np.flatnonzero(~np.append(from_tool, False)).astype(np.int32)
    by_tool = replace(
        toy_trajectory(np.arange(length + 1).tolist(), actor="ä" * 100, prompt="frage " * 9),
        from_tool=from_tool,
        stops=stops,
        log_reward=-rng.random(stops.size, dtype=np.float32),
        behaviour_log_prob=np.where(from_tool, 0, -1).astype(np.float32),
        behaviour_log_stop=np.zeros(stops.size, np.float32),
        policy_version=2**40,
        created_s=1_700_000_000.123456,
        correct=None,
    )
    buffer.seed([plain])
    buffer.seed([by_tool])
    found = list(browser.summaries([by_tool.id, "0" * 32, plain.id]))
    assert found == [Summary.of(by_tool), Summary.of(plain)]
    assert [summary.used_tool for summary in found] == [True, False]


def test_a_revision_moves_exactly_when_the_prompt_changes(client: redis.Redis) -> None:
    buffer, browser, _ = opened(client)
    buffer.seed([toy_trajectory(prompt="p"), toy_trajectory(prompt="q")])
    before = browser.revisions()
    buffer.add([toy_trajectory(prompt="q", actor="again")])
    after = browser.revisions()
    assert after["p"] == before["p"] and after["q"] > before["q"]


def test_looking_changes_nothing_not_even_what_is_damaged(client: redis.Redis) -> None:
    buffer, browser, run = opened(client)
    buffer.seed([toy_trajectory((1, 2)), toy_trajectory((5, 6, 7, 8))])
    good, bad = (trajectory.id for trajectory in replay_of(buffer))
    client.hset(f"{{amortize:{run}}}:payload", bad, b"no trajectory")
    before = dumps(client, run)
    assert [t.id for t in browser.trajectories([good, bad, "0" * 32])] == [good]
    assert [summary.id for summary in browser.summaries([good, bad, "0" * 32])] == [good]
    browser.stats(), browser.revisions(), browser.tallies(), browser.ids(["p", "unknown"])
    assert dumps(client, run) == before and len(before) > 3


def test_a_folder_tells_where_its_server_listens(tmp_path: Path) -> None:
    with pytest.raises(NeverServed, match="no redis-server was ever started"):
        reach(tmp_path, BufferConfig())
    server = RedisServer.start(tmp_path, run="toy", config=BufferConfig())
    try:
        url, password = reach(tmp_path, BufferConfig())
        assert (url, password) == (server.url, server.password)
        connect(url, password=password, timeout_s=5.0).close()
    finally:
        server.stop(timeout_s=10.0)
    assert reach(tmp_path, BufferConfig()) == (url, password)
