"""Damage in the store is reported, counted and put aside."""

from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import redis

from bench.audit import audit_buffer, main
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import ForeignKeys, RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer
from buffer.trajectory import pack
from cluster.config.file import load_config, resolved_toml
from cluster.run.directory import RunDirectory
from tests.buffer_toy import random_trajectory, replay_of, toy_request, toy_trajectory

ROOT = Path(__file__).resolve().parent.parent


def test_damaged_payloads_go_to_quarantine_and_the_learner_goes_on(client: redis.Redis) -> None:
    warnings: list[str] = []
    run = uuid4().hex
    # One draw exhausts a group, so the damaged one is counted as exhausted before it is read.
    buffer = ReplayBuffer(
        RedisStore(client, run=run), config=BufferConfig(max_draws=1), warn=warnings.append
    )
    prefix = f"{{amortize:{run}}}"
    rng = np.random.default_rng(0)
    groups = [[random_trajectory(rng, prompt="p") for _ in range(2)] for _ in range(2)]
    for group in groups:
        buffer.add(group)
    client.hset(f"{prefix}:payload", groups[0][0].id, b"\xc1 not msgpack")
    client.hdel(f"{prefix}:payload", groups[0][1].id)
    client.hset(f"{prefix}:groups", f"{2:016d}", b"garbage")
    assert len(audit_buffer(buffer).discrepancies) >= 3
    (found,) = buffer.draw(toy_request(1, num_replayed=9, rng=rng))
    assert [t.id for t in found.fresh] == [t.id for t in groups[0]]
    assert {t.id for t in found.replayed} == {t.id for t in groups[1]}
    buffer.add([random_trajectory(rng, prompt="p")])  # reads the prompt, finds the missing one
    assert len(warnings) == 3 and all("quarantined" in warning for warning in warnings)
    counters = buffer.stats().counters
    assert (counters.quarantined, counters.groups_quarantined) == (2, 1)
    assert b"\xc1 not msgpack" in client.hvals(f"{prefix}:quarantine")
    audit = audit_buffer(buffer)
    assert audit.ok, audit.discrepancies


def test_an_add_survives_whatever_its_prompt_holds(client: redis.Redis) -> None:
    whole = pack(toy_trajectory(range(300)))
    at = whole.index(np.arange(300, dtype="<i4").tobytes())
    huge = whole[:at] + b"\xff\xff\x7f\x7f" + whole[at + 4 :]
    cut = [whole[:end] for end in (0, 1, 5, 9, 30, at, at + 40, at + 1199)]
    for number, damaged in enumerate([huge, b"\x9d\x01" + whole[:9], b"\xff" * 300, *cut]):
        run, warnings = uuid4().hex, list[str]()
        buffer = ReplayBuffer(
            RedisStore(client, run=run), config=BufferConfig(), warn=warnings.append
        )
        buffer.add([toy_trajectory(range(300))])
        (stored,) = replay_of(buffer)
        client.hset(f"{{amortize:{run}}}:payload", stored.id, damaged)
        buffer.add([toy_trajectory(range(1, 290))])
        assert [t.completion.size for t in replay_of(buffer)] == [289], number
        (warning,) = warnings
        assert f"quarantined trajectory {stored.id}" in warning
        assert audit_buffer(buffer).ok


def test_the_audit_sees_what_a_counter_or_an_index_hides(client: redis.Redis) -> None:
    run = uuid4().hex
    buffer = ReplayBuffer(RedisStore(client, run=run), config=BufferConfig())
    first, second = toy_trajectory((1,)), toy_trajectory((2, 2, 2))
    buffer.add([first, second])
    prefix = f"{{amortize:{run}}}"
    client.hincrby(f"{prefix}:meta", "offered", 1)
    assert "3 trajectories offered, 2 stored" in audit_buffer(buffer).discrepancies[0]
    client.hincrby(f"{prefix}:meta", "offered", -1)
    rank = client.zscore(f"{prefix}:priority", first.id + "p")
    assert rank is not None
    client.zadd(f"{prefix}:priority", {first.id + "p": -99.0})
    assert "differ in 2 entries" in audit_buffer(buffer).discrepancies[0]
    client.zadd(f"{prefix}:priority", {first.id + "p": rank})
    payload = client.hget(f"{prefix}:payload", first.id)
    client.hset(f"{prefix}:payload", second.id, payload)
    assert any("is that of" in sentence for sentence in audit_buffer(buffer).discrepancies)


def test_keys_of_another_kind_or_format_are_refused(client: redis.Redis) -> None:
    run = uuid4().hex
    client.set(f"{{amortize:{run}}}:meta", "mine")
    with pytest.raises(ForeignKeys, match="is a string"):
        ReplayBuffer(RedisStore(client, run=run), config=BufferConfig())
    client.delete(f"{{amortize:{run}}}:meta")
    client.hset(f"{{amortize:{run}}}:meta", "format", "0")
    with pytest.raises(ForeignKeys, match="format"):
        ReplayBuffer(RedisStore(client, run=run), config=BufferConfig())


def test_a_buffer_of_the_format_before_is_ranked_anew_and_kept(client: redis.Redis) -> None:
    run, config = uuid4().hex, BufferConfig()
    buffer = ReplayBuffer(RedisStore(client, run=run), config=config)
    rng = np.random.default_rng(0)
    stored = [random_trajectory(rng, prompt=prompt) for prompt in "ppq"]
    buffer.seed(stored)
    prefix = f"{{amortize:{run}}}"
    client.hset(f"{prefix}:meta", "format", "1")
    client.zadd(f"{prefix}:priority", {t.id + t.prompt_key: t.terminal_log_reward for t in stored})
    assert "the ranking and the prompts differ" in audit_buffer(buffer).discrepancies[0]
    later = ReplayBuffer(RedisStore(client, run=run), config=config)
    audit = audit_buffer(later)
    assert audit.ok and audit.replay_size == 3, audit.discrepancies
    assert client.hget(f"{prefix}:meta", "format") == b"2"


def test_the_buffer_of_a_run_that_has_ended_is_recounted_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config, directory = load_config(str(ROOT / "tasks/toy.toml")), RunDirectory("ended")
    directory.path.mkdir(parents=True)
    directory.config_file.write_text(resolved_toml(config))
    for hidden, expected in (
        (0, "all that was accepted is accounted for"),
        (1, "4 trajectories offered, 3 stored or counted as gone"),
    ):
        server = RedisServer.start(directory.buffer, run="ended", config=config.buffer)
        with connect(server.url, password=server.password, timeout_s=10.0) as client:
            if not hidden:
                buffer = ReplayBuffer(RedisStore(client, run="ended"), config=config.buffer)
                buffer.add([toy_trajectory((1, 2))] * 2)
                buffer.add([toy_trajectory((7, 8, 9, 3))])
            client.hincrby("{amortize:ended}:meta", "offered", hidden)
        server.stop(timeout_s=20.0)
        assert main(["ended"]) == hidden
        assert capsys.readouterr().out.splitlines()[-1] == expected
