"""Fixtures of the tests of the buffer: a redis-server for all of them, and both kinds of store."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest
import redis

from buffer.memory import MemoryStore
from buffer.redis_store import RedisStore
from buffer.store import Store
from tests.buffer_toy import serving


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A client of a redis-server that the tests share: each takes a run's name of its own."""
    with serving(tmp_path_factory.mktemp("redis")) as (_, client):
        yield client


@pytest.fixture(params=["redis", "memory"])
def make_store(request: pytest.FixtureRequest) -> Callable[..., Store]:
    """A function from a run's name to its store, for each kind of store; None: a run of its own."""
    if request.param == "memory":
        stores: dict[str, Store] = defaultdict(MemoryStore)
        return lambda run=None: stores[run or uuid4().hex]
    client = request.getfixturevalue("client")
    return lambda run=None: RedisStore(client, run=run or uuid4().hex)
