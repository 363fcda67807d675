"""Milliseconds to add and to draw, against redis-py used plainly, on one server in one run.

*pipelined*, the strongest simple alternative: the commands of a group in one MULTI, with the same
record on the same server, appendfsync always: per trajectory the payload, a rank, an arrival and a
trim. *naive*: the same, one command per round trip. Neither has a quota per prompt, deduplication
that counts or a near-duplicate rule, which ours has switched on. *decoding* is ours, except that it
fetches and decodes every payload of a prompt to plan an add or a draw. Rounds of all four
alternate; figures are medians. `ratio` is pipelined / ours, `naive_ratio` naive / ours,
`decoding_ratio` decoding / ours.

    python bench/replay.py [--json] [--repeats N]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redis

from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import DrawRequest, ReplayBuffer
from buffer.server import RedisServer
from buffer.store import Stored
from buffer.trajectory import Trajectory, pack, unpack

NUM_REPLAYED = 4
CONFIG = BufferConfig(capacity=20_000, quota_per_prompt=50)
RATIOS = {"ratio": "pipelined", "naive_ratio": "naive", "decoding_ratio": "decoding"}


@dataclass(frozen=True, slots=True)
class Case:
    """Groups of `group` trajectories of `length` tokens; a draw takes those of half the prompts."""

    group: int
    length: int
    prompts: int = 32


CASES = (
    Case(group=16, length=40),
    Case(group=16, length=250),
    Case(group=64, length=40),
    Case(group=16, length=2000, prompts=4),
)


class DecodingStore(RedisStore):
    """Learns from whole trajectories what there is of a prompt."""

    def read_completions(self, prompt: str, shortest: int, longest: int) -> Stored:
        found = [each.completion.astype("<i4").tobytes() for each in self._decoded(prompt)]
        (revision,) = self.read(("HGET", "revision", prompt))
        (ranked,) = super().rank([prompt])
        return int(revision or 0), [
            (id, score, tokens) for (id, score), tokens in zip(ranked, found, strict=True)
        ]

    def rank(self, prompts: Sequence[str]) -> list[list[tuple[str, float]]]:
        return [
            [(each.id, each.terminal_log_reward) for each in self._decoded(prompt)]
            for prompt in prompts
        ]

    def _decoded(self, prompt: str) -> list[Trajectory]:
        (ranked,) = super().rank([prompt])
        return [unpack(payload or b"") for payload in self.peek([id for id, _ in ranked])]


class NaiveBuffer:
    """A hash of payloads, a ranking, and a list of arrivals; every command waits for its answer."""

    def __init__(self, client: redis.Redis) -> None:
        self._client: Any = client  # redis-py types one signature for all answer formats

    def add(self, group: Sequence[Trajectory]) -> None:
        for trajectory in group:
            id = trajectory.id
            if not self._client.hexists("naive:payload", id):
                self._client.lpush("naive:arrivals", id)
            self._client.hset("naive:payload", id, pack(trajectory))
            self._client.zadd("naive:rank", {id: trajectory.terminal_log_reward})
            if self._client.zcard("naive:rank") > CONFIG.capacity:
                self._client.zpopmin("naive:rank")

    def draw(self, num_fresh: int, num_replayed: int, rng: np.random.Generator) -> list[Trajectory]:
        ids = self._ids("naive", num_fresh, num_replayed, rng)
        return [unpack(self._client.hget("naive:payload", id)) for id in ids]

    def _ids(
        self, keys: str, num_fresh: int, num_replayed: int, rng: np.random.Generator
    ) -> list[bytes]:
        """The newest, and some of the others by the softmax of their log-rewards."""
        ids = self._client.lrange(f"{keys}:arrivals", 0, num_fresh - 1)
        ranked = self._client.zrange(f"{keys}:rank", 0, -1, withscores=True)
        log_reward = np.array([score for _, score in ranked])
        weight = np.exp(log_reward - log_reward.max())
        picks = rng.choice(len(ranked), num_replayed, replace=False, p=weight / weight.sum())
        return [*ids, *(ranked[pick][0] for pick in picks)]


class PipelinedBuffer(NaiveBuffer):
    """The same, with the commands of a group in one transaction and payloads fetched at once."""

    def add(self, group: Sequence[Trajectory]) -> None:
        with self._client.pipeline(transaction=True) as pipe:
            for trajectory in group:
                pipe.lpush("pipelined:arrivals", trajectory.id)
                pipe.hset("pipelined:payload", trajectory.id, pack(trajectory))
                pipe.zadd("pipelined:rank", {trajectory.id: trajectory.terminal_log_reward})
            pipe.zremrangebyrank("pipelined:rank", 0, -CONFIG.capacity - 1)
            pipe.execute()

    def draw(self, num_fresh: int, num_replayed: int, rng: np.random.Generator) -> list[Trajectory]:
        ids = self._ids("pipelined", num_fresh, num_replayed, rng)
        return [unpack(payload) for payload in self._client.hmget("pipelined:payload", ids)]


def random_trajectory(rng: np.random.Generator, prompt: int, length: int) -> Trajectory:
    return Trajectory(
        task="bench",
        prompt_key=f"prompt-{prompt}",
        prompt=rng.integers(0, 1000, 60, dtype=np.int32),
        answer=rng.integers(0, 1000, 6, dtype=np.int32),
        completion=rng.integers(0, 1000, length, dtype=np.int32),
        from_tool=np.zeros(length, np.bool_),
        stops=np.arange(length + 1, dtype=np.int32),
        log_reward=-rng.random(length + 1, dtype=np.float32),
        behaviour_log_prob=-rng.random(length, dtype=np.float32),
        behaviour_log_stop=-rng.random(length + 1, dtype=np.float32),
        policy_version=0,
        behaviour="on_policy",
        temperature=1.0,
        actor="bench",
        created_s=time.time(),
        correct=None,
    )


def elapsed_ms(action: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    action()
    return (time.perf_counter() - start_s) * 1e3


def measure(client: redis.Redis, case: Case, repeats: int) -> list[dict[str, object]]:
    """Rows for add and draw of one workload, on an emptied server."""
    client.flushall()
    rng = np.random.default_rng(0)
    buffers = {
        "ours": ReplayBuffer(RedisStore(client, run="bench"), config=CONFIG),
        "decoding": ReplayBuffer(DecodingStore(client, run="decoding"), config=CONFIG),
    }
    num_groups = case.prompts // 2
    others = {"pipelined": PipelinedBuffer(client), "naive": NaiveBuffer(client)}
    request = DrawRequest(
        num_groups=num_groups, num_replayed=NUM_REPLAYED, version=0, rng=rng, timeout_s=1.0
    )
    times: dict[str, list[float]] = defaultdict(list)
    # Enough rounds first to fill every prompt to its quota, which is the slowest state of an add.
    warm_up = -(-CONFIG.quota_per_prompt * case.prompts // (num_groups * case.group)) + 1
    for turn in range(warm_up + repeats):
        for i in range(num_groups):
            prompt = (turn * num_groups + i) % case.prompts
            group = [random_trajectory(rng, prompt, case.length) for _ in range(case.group)]
            for name, buffer in buffers.items():
                times[f"{name} add"].append(elapsed_ms(partial(buffer.add, group)))
            if i == 0 or turn == 0:
                for name, other in others.items():
                    times[f"{name} add"].append(elapsed_ms(partial(other.add, group)))
        for name, buffer in buffers.items():
            times[f"{name} draw"].append(elapsed_ms(partial(buffer.draw, request)))
        num_fresh, num_replayed = num_groups * case.group, num_groups * NUM_REPLAYED
        for name, other in others.items():
            draw = partial(other.draw, num_fresh, num_replayed, rng)
            times[f"{name} draw"].append(elapsed_ms(draw))
    median = {name: statistics.median(values[-repeats:]) for name, values in times.items()}
    size = len(pack(random_trajectory(rng, 0, case.length)))
    rows: list[dict[str, object]] = []
    for what in ("add", "draw"):
        taken_ms = {name: median[f"{name} {what}"] for name in (*buffers, *others)}
        row: dict[str, object] = {
            "what": what,
            "group": case.group,
            "length": case.length,
            "bytes": size,
        }
        row |= {f"{name}_ms": round(value, 2) for name, value in taken_ms.items()}
        ratios = {key: taken_ms[name] / taken_ms["ours"] for key, name in RATIOS.items()}
        rows.append(row | {key: round(value, 2) for key, value in ratios.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help='print {"rows": [...]}')
    parser.add_argument("--repeats", type=int, default=10, help="rounds per row (default 10)")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer.start(Path(folder), run="bench", config=CONFIG)
        try:
            with connect(server.url, password=server.password, timeout_s=10.0) as client:
                for case in CASES:
                    rows += measure(client, case, arguments.repeats)
        finally:
            server.stop(timeout_s=10.0)
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"add one group; draw groups of half the prompts with {NUM_REPLAYED} replayed each")
    print("".join(f"{name:>15}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value!s:>15}" for value in row.values()))


if __name__ == "__main__":
    main()
