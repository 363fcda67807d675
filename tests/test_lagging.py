"""Weights that arrive late on purpose: exactly as late as was asked for, and never too late."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from actors.weight_sources import LaggingWeights
from bench.audit import audit_buffer
from buffer.config import BufferConfig
from buffer.replay import DrawRequest, Group, ReplayBuffer
from buffer.server import RedisServer
from cluster.config.file import load_config
from cluster.run import assembly as roles
from cluster.run.directory import RunDirectory
from cluster.run.local import LocalRun
from cluster.run.session import BufferAddress
from cluster.run.weight_store import WeightStore

LAG, MAX_AGE = 5, 6


def publish(store: WeightStore, version: int) -> None:
    store.publish(b"", version=version, checksum="")


def polled(weights: LaggingWeights, held: int) -> int:
    """The version that an actor samples with after asking once."""
    fresh = weights.newer_than(held)
    return held if fresh is None else fresh.version


def test_an_actor_that_asks_often_is_exactly_the_lag_behind() -> None:
    store = WeightStore[bytes]()
    weights = LaggingWeights(store, lag=3, max_lag=9)
    held = polled(weights, 0)
    for newest in range(12):
        publish(store, newest)
        held = polled(weights, held)
        assert held == max(newest - 3, 0)
        assert polled(weights, held) == held


def test_between_publications_it_is_the_newest_that_is_old_enough() -> None:
    store = WeightStore[bytes]()
    weights = LaggingWeights(store, lag=4, max_lag=9)
    held = 0
    for newest, expected in [(0, 0), (3, 0), (6, 0), (7, 3), (8, 3), (10, 6), (13, 8)]:
        publish(store, newest)
        held = polled(weights, held)
        assert held == expected


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
def test_nobody_ever_gets_further_behind_than_the_limit(every: int) -> None:
    store = WeightStore[bytes]()
    weights = LaggingWeights(store, lag=4, max_lag=6)
    held = 0
    for newest in range(60):
        publish(store, newest)
        if newest % every == 0:
            held = polled(weights, held)
            assert newest - held <= 6
            # Younger than the lag only where the one that was due has not been seen.
            assert newest - held >= min(4, newest) or newest - held > 4 - every


def test_an_actor_that_joins_late_begins_with_what_there_is() -> None:
    store = WeightStore[bytes]()
    publish(store, 40)
    weights = LaggingWeights(store, lag=3, max_lag=9)
    held = [polled(weights, 0)]
    for newest in range(41, 47):
        publish(store, newest)
        held.append(polled(weights, held[-1]))
    assert held == [40, 40, 40, 40, 41, 42, 43]
    store = WeightStore[bytes]()
    weights = LaggingWeights(store, lag=3, max_lag=9)
    assert weights.newer_than(-1) is None
    publish(store, 1)
    assert polled(weights, 0) == 0  # which it began with
    assert polled(weights, -1) == 1  # one that has none takes what there is


def test_a_lag_that_the_buffer_would_not_tolerate_is_refused() -> None:
    def load(lag: int, every: int) -> None:
        load_config(
            "tasks/toy.toml",
            [
                f"actors.lag_versions={lag}",
                f"learner.publish_every_steps={every}",
                "buffer.max_age=6",
            ],
        )

    load(6, 1)
    load(4, 3)
    for lag, every in [(7, 1), (5, 3)]:
        with pytest.raises((ValidationError, ValueError), match=r"must not exceed buffer\.max_age"):
            load(lag, every)


class Watched:
    """Notes the ages of what is drawn."""

    def __init__(self, replay: Any) -> None:
        self._replay = replay
        self.ages: list[list[int]] = []

    def draw(self, request: DrawRequest) -> list[Group]:
        groups: list[Group] = self._replay.draw(request)
        self.ages.append(
            [request.version - t.policy_version for group in groups for t in group.fresh]
        )
        return groups

    def discard(self, trajectories: Any) -> None:
        self._replay.discard(trajectories)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer.start(tmp_path / "buffer", run="test", config=BufferConfig())
    yield running
    running.stop(timeout_s=30)


def held_back(folder: Path, server: RedisServer) -> tuple[LocalRun, Watched, ReplayBuffer]:
    """A run of the toy whose actor lags close to the age at which the buffer drops."""
    steps = 24
    config = load_config(
        "tasks/toy.toml",
        [
            f"actors.lag_versions={LAG}",
            f"buffer.max_age={MAX_AGE}",
            "actors.groups_per_batch=3",
            "actors.group_size=4",
            "learner.groups_per_step=2",
            "learner.starvation_timeout_s=20.0",
            "learner.agreement_check_share=1.0",
            f"learner.steps={steps}",
        ],
    )
    run = LocalRun(
        config,
        directory=RunDirectory("test", root=folder),
        buffer=BufferAddress(url=server.url, password=server.password),
        report=print,
    )
    watched = Watched(run._learner.replay)
    run._learner.replay = watched
    while not run.finished:
        run.tick()
    run.stop(timeout_s=30)
    address = BufferAddress(url=server.url, password=server.password)
    buffer = roles.build_buffer(config, run="test", place=address)
    return run, watched, buffer


def test_a_run_held_near_the_limit_sees_the_ages_it_was_promised_and_starves_of_nothing(
    tmp_path: Path, server: RedisServer
) -> None:
    run, watched, buffer = held_back(tmp_path, server)
    assert len(run.learner_rows) == len(watched.ages) == 24
    for version, ages in enumerate(watched.ages):
        assert min(ages) >= min(LAG, version), (version, ages)
        assert max(ages) <= MAX_AGE, (version, ages)
    assert {age for ages in watched.ages[MAX_AGE:] for age in ages} == {LAG, MAX_AGE}
    # Too old means dropped, and what is dropped is counted.
    counters = buffer.stats().counters
    assert counters.groups_expired > 0
    assert counters.groups_drawn == 24 * 2
    assert audit_buffer(buffer).ok, audit_buffer(buffer).discrepancies
    # The ages are true: every trajectory is what the version that it names would have sampled.
    for row in run.learner_rows:
        assert row["agreement/checked"] == row["batch/trajectories"]
        assert row["agreement/admitted_max_nats"] < 1e-4
    assert np.isfinite([row["loss/value"] for row in run.learner_rows]).all()
