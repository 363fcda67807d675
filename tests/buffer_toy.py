"""Small trajectories and a real redis-server for the tests of the buffer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis

from bench.audit import contents_of
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.replay import DrawRequest, ReplayBuffer
from buffer.server import RedisServer
from buffer.store import Store
from buffer.trajectory import Trajectory, unpack

MakeStore = Callable[..., Store]


def toy_trajectory(
    completion: Sequence[int] = (1, 2, 3),
    *,
    prompt: str = "p",
    log_reward: float = -1.0,
    **changes: Any,
) -> Trajectory:
    """A valid trajectory that may stop everywhere; `log_reward` is that of its end."""
    length = len(completion)
    fields: dict[str, Any] = {
        "task": "toy",
        "prompt_key": prompt,
        "prompt": np.array([7, 8], np.int32),
        "answer": np.array([9], np.int32),
        "completion": np.array(completion, np.int32),
        "from_tool": np.zeros(length, np.bool_),
        "stops": np.arange(length + 1, dtype=np.int32),
        "log_reward": np.full(length + 1, log_reward, np.float32),
        "behaviour_log_prob": np.full(length, -0.5, np.float32),
        "behaviour_log_stop": np.full(length + 1, -0.25, np.float32),
        "policy_version": 0,
        "behaviour": "on_policy",
        "temperature": 1.0,
        "actor": "actor-0",
        "created_s": 1.0,
        "correct": None,
    }
    return Trajectory(**(fields | changes))


def replay_of(buffer: ReplayBuffer) -> list[Trajectory]:
    """All that is in replay, prompt by prompt, the best of each first."""
    contents = contents_of(buffer.store)
    return [
        unpack(contents.payload[id])
        for _, items in sorted(contents.prompts.items())
        for _, id in sorted(((score, id) for id, score in items.items()), reverse=True)
    ]


def random_trajectory(rng: np.random.Generator, *, prompt: str, length: int = 12) -> Trajectory:
    """One that no other is like, in all probability."""
    completion = rng.integers(0, 10_000, length).tolist()
    return toy_trajectory(completion, prompt=prompt, log_reward=float(np.float32(-rng.random())))


def toy_request(
    num_groups: int = 1,
    *,
    num_replayed: int = 0,
    version: int = 0,
    rng: np.random.Generator | None = None,
    timeout_s: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> DrawRequest:
    """A request that does not wait."""
    return DrawRequest(
        num_groups=num_groups,
        num_replayed=num_replayed,
        version=version,
        rng=np.random.default_rng(0) if rng is None else rng,
        timeout_s=timeout_s,
        stop=stop,
    )


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[tuple[RedisServer, redis.Redis]]:
    """A managed server on a folder, and a client of it."""
    server = RedisServer.start(folder, run="toy", config=BufferConfig(**settings))
    try:
        client = connect(server.url, password=server.password, timeout_s=5.0)
        yield server, client
        client.close()
    finally:
        server.stop(timeout_s=10.0)
