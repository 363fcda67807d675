"""What was acknowledged is kept: across kill -9 of redis-server under load, and restarts."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from bench.audit import audit_buffer
from buffer.config import BufferConfig
from buffer.connection import (
    connect,
    durability,
)
from buffer.redis_store import RedisStore
from buffer.replay import DrawRequest, ReplayBuffer
from buffer.server import RedisServer
from tests.buffer_toy import random_trajectory, replay_of, serving, toy_trajectory

ROOMY = BufferConfig(capacity=10**6, quota_per_prompt=10**6, near_duplicate_tolerance=0)
KEEPING = ROOMY.model_copy(update={"fresh_capacity": 10**6, "timeout_s": 30.0})


def write_until_told(writer: int, url: str, password: str, control: Connection) -> None:
    """Add groups of four; tell the ids of each group once it is acknowledged."""
    rng = np.random.default_rng(writer)
    with connect(url, password=password, timeout_s=30.0) as client:
        buffer = ReplayBuffer(RedisStore(client, run="toy"), config=KEEPING)
        while not control.poll():
            prompt = f"p{writer}-{rng.integers(1000)}"
            group = [random_trajectory(rng, prompt=prompt, length=200) for _ in range(4)]
            buffer.add(group)
            control.send([trajectory.id for trajectory in group])
    control.send(None)


def test_kill_9_under_load_loses_nothing_acknowledged_and_doubles_nothing(tmp_path: Path) -> None:
    server = RedisServer.start(tmp_path, run="toy", config=KEEPING)
    url, password = server.url, server.password
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    writers = [
        context.Process(target=write_until_told, args=(i, url, password, theirs))
        for i, (_, theirs) in enumerate(pipes)
    ]
    for writer in writers:
        writer.start()
    acknowledged: list[list[list[str]]] = [[], []]

    def read_more(num_groups: int) -> None:
        for (ours, _), groups in zip(pipes, acknowledged, strict=True):
            for _ in range(num_groups):
                assert ours.poll(timeout=60.0), "a writer has stopped"
                groups.append(ours.recv())

    for _ in range(3):
        read_more(15)
        os.kill(server.pid, signal.SIGKILL)
        server.stop(timeout_s=5.0)
        server = RedisServer.start(tmp_path, run="toy", config=KEEPING)
        assert server.url == url, "writers wait on the old address"
    read_more(5)
    for (ours, _), groups in zip(pipes, acknowledged, strict=True):
        ours.send("stop")
        while (ids := ours.recv()) is not None:
            groups.append(ids)
    for writer in writers:
        writer.join(timeout=30.0)
        assert writer.exitcode == 0
        writer.close()
    with connect(url, password=password, timeout_s=5.0) as client:
        buffer = ReplayBuffer(RedisStore(client, run="toy"), config=KEEPING)
        stored = {trajectory.id for trajectory in replay_of(buffer)}
        audit = audit_buffer(buffer)
    server.stop(timeout_s=10.0)
    sent = [ids for groups in acknowledged for ids in groups]
    assert {id for ids in sent for id in ids} == stored
    assert audit.ok, audit.discrepancies
    assert audit.counters.groups_accepted == audit.fresh_groups == len(sent)
    assert audit.counters.duplicates == 0


def test_a_restart_on_the_same_folder_restores_everything(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    group = [random_trajectory(rng, prompt="p") for _ in range(3)]
    with serving(tmp_path) as (first, client):
        before = ReplayBuffer(RedisStore(client, run="toy"), config=ROOMY)
        before.add(group)
        before.add([toy_trajectory()])
        before.draw(DrawRequest(num_groups=1, num_replayed=2, version=3, rng=rng, timeout_s=0.0))
        expected = (before.stats(), [t.id for t in replay_of(before)])
    assert (tmp_path / "password").stat().st_mode & 0o077 == 0
    assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
    with serving(tmp_path) as (second, client):
        after = ReplayBuffer(RedisStore(client, run="toy"), config=ROOMY)
        assert (after.stats(), [t.id for t in replay_of(after)]) == expected
        assert (second.url, second.password) == (first.url, first.password)
        assert after.add(group).fate == "repeated", "the store forgot which groups it knows"


def test_the_managed_server_syncs_every_write(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, client):
        assert durability(client) == "always"
        client.config_set("appendfsync", "everysec")
        assert durability(client) == "everysec"
