"""Whole actors with damaged weights among honest ones: none of what they sample is learned from."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from actors.actor import RolloutActor
from actors.protocols import RolloutEngine
from bench.audit import audit_buffer
from buffer.config import BufferConfig
from buffer.replay import DrawRequest, Group, ReplayBuffer
from buffer.server import RedisServer
from buffer.trajectory import Trajectory
from cluster.config.file import load_config
from cluster.config.project import PROJECT_ROOT
from cluster.config.schema import RunConfig
from cluster.run import assembly as roles
from cluster.run.directory import RunDirectory
from cluster.run.session import BufferAddress
from cluster.run.weight_store import WeightStore
from learner.agreement.quarantine import read_quarantine
from learner.agreement.tolerance import SamplersDisagree
from learner.engine import TorchEngine
from learner.learner import Learner
from lm.model import load_base
from lm.sampling import Ended, Request
from reward.lockstep import UnshardedRank
from reward.replica import RewardReplica
from tests.damaged_run import DAMAGED

STEPS = 6
SMALL = [
    "actors.groups_per_batch=2",
    "actors.group_size=4",
    "actors.max_unstored=8",
    "learner.groups_per_step=4",
]


class DamagedMemory(RolloutEngine):
    """A policy one number of whose weights changes after the actor has verified them."""

    def __init__(self, policy: Any, place: str) -> None:
        self._policy = policy
        self._place = place
        if place == "base":
            with torch.no_grad():
                policy.model.get_output_embeddings().weight[3, 0] += 2.0

    def submit(self, requests: Sequence[Request]) -> list[int]:
        numbers: list[int] = self._policy.submit(requests)
        return numbers

    def poll(self) -> list[Ended]:
        ended: list[Ended] = self._policy.poll()
        return ended

    def load(self, adapter: bytes) -> None:
        damage = struct.pack("<f", 3.0) if self._place == "adapter" else b""
        self._policy.load(adapter[: len(adapter) - len(damage)] + damage)


class Observed:
    """A gate; keeps what went in and what came out."""

    def __init__(self, gate: Any) -> None:
        self._gate = gate
        self.drawn: list[Trajectory] = []
        gate.replay = Ears(gate.replay, self.drawn)
        self.admitted: list[Trajectory] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gate, name)

    def draw(self, request: DrawRequest) -> list[Group]:
        groups: list[Group] = self._gate.draw(request)
        self.admitted += [t for group in groups for t in (*group.fresh, *group.replayed)]
        return groups


class Ears:
    """A replay that is listened to."""

    def __init__(self, replay: ReplayBuffer, heard: list[Trajectory]) -> None:
        self._replay = replay
        self._heard = heard

    def draw(self, request: DrawRequest) -> list[Group]:
        groups = self._replay.draw(request)
        self._heard += [t for group in groups for t in (*group.fresh, *group.replayed)]
        return groups

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        self._replay.discard(trajectories)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer.start(tmp_path / "redis", run="any", config=BufferConfig())
    yield running
    running.stop(timeout_s=30)


MakeCast = Callable[..., "Cast"]


class Cast:
    """Two honest actors, one between them that may be damaged, and a learner; real parts all.

    They begin at version 1, so that every actor has loaded an adapter before it samples.
    """

    def __init__(
        self, config: RunConfig, folder: Path, server: RedisServer, *, damaged: str | None
    ) -> None:
        base, task = roles.load_task(config)
        store = WeightStore[bytes]()
        self._replicas: list[RewardReplica] = []
        self.buffer = roles.build_buffer(
            config,
            run=folder.name,
            place=BufferAddress(url=server.url, password=server.password),
        )
        self.warnings: list[str] = []
        self.learner: Learner = roles.build_learner(
            config,
            base=base,
            task=task,
            directory=RunDirectory(folder.name, root=folder.parent),
            make_engine=TorchEngine,
            buffer=self.buffer,
            weights=store,
            warn=self.warnings.append,
        )
        self.gate = Observed(self.learner.gate)
        self.learner.replay = self.learner.gate = self.gate  # type: ignore[assignment]

        def actor(index: int) -> RolloutActor:
            # One each: a replica remembers scores, and what it scored together rounds together.
            whole = UnshardedRank(load_base(config.lm).model)
            scorer = RewardReplica(whole, [], config.reward, name=f"reward-{index}")
            self._replicas.append(scorer)
            return roles.build_actor(
                config,
                policy=roles.model_policy(config, load_base(config.lm), task),
                task=task,
                name=f"actor-{index}",
                seed=(config.seed, index),
                buffer=self.buffer,
                scorer=scorer,
                weights=store,
            )

        self.actors = [actor(0), actor(2)]
        if damaged is not None:
            liar = actor(1)
            liar.policy = DamagedMemory(liar.policy, damaged)
            self.actors.insert(1, liar)
        self.learner.version = 1
        self.learner.publish()

    def play(self, steps: int) -> list[dict[str, float]]:
        """Every actor brings a batch, then the learner takes a step; again and again."""
        rows = []
        for _ in range(steps):
            for actor in self.actors:
                actor.step()
            rows.append(self.learner.step())
        return rows

    def close(self) -> None:
        for replica in self._replicas:
            replica.close(5.0)


@pytest.fixture
def make_cast(server: RedisServer, tmp_path: Path) -> Iterator[MakeCast]:
    """A function that builds a cast of the toy, in a folder and a buffer of its own."""
    casts: list[Cast] = []

    def make(name: str, *changes: str, damaged: str | None) -> Cast:
        config = load_config("tasks/toy.toml", [*SMALL, *changes])
        casts.append(Cast(config, tmp_path / name, server, damaged=damaged))
        return casts[-1]

    yield make
    for cast in casts:
        cast.close()


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_a_run_with_a_damaged_actor_is_the_run_that_never_saw_it(
    place: str, make_cast: MakeCast, tmp_path: Path
) -> None:
    mixed = make_cast("mixed", "learner.agreement_max_share=0.9", damaged=place)
    alone = make_cast("alone", "learner.agreement_max_share=0.9", damaged=None)
    rows, plain = mixed.play(STEPS), alone.play(STEPS)

    wrong = [t for t in mixed.gate.drawn if t.actor == DAMAGED]
    assert len(wrong) == STEPS * 2 * 4, "not every group of the damaged actor was drawn"
    assert sum(row["agreement/quarantined"] for row in rows) == len(wrong)
    assert not [t for t in mixed.gate.admitted if t.actor == DAMAGED]
    kept = list(read_quarantine(tmp_path / "mixed/quarantine"))
    assert sorted(outcome.trajectory.id for outcome in kept) == sorted(t.id for t in wrong)
    assert min(outcome.rms_nats for outcome in kept) > 1e-3
    versions = sorted({t.policy_version for t in wrong})
    assert len(mixed.warnings) == len(versions) == STEPS
    for version, warning in zip(versions, mixed.warnings, strict=True):
        assert f"{DAMAGED} at version {version} is off by" in warning

    assert sum(row["agreement/quarantined"] for row in plain) == 0
    assert alone.warnings == [] and not (tmp_path / "alone/quarantine").exists()
    for row, other in zip(rows, plain, strict=True):
        assert row["loss/value"] == other["loss/value"]
        assert row["batch/trajectories"] == other["batch/trajectories"]
        for one in (row, other):
            accounted = one["agreement/checked"] + one["agreement/vouched"]
            assert accounted == one["batch/trajectories"] + one["agreement/quarantined"]
            assert one["agreement/unchecked"] == 0
            assert one.get("agreement/admitted_max_nats", 0.0) < 1e-4
    assert rows[0]["agreement/admitted_max_nats"] > 0
    state, other_state = mixed.learner.engine.state(), alone.learner.engine.state()
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_nothing_of_a_damaged_actor_comes_back_through_replay(make_cast: MakeCast) -> None:
    cast = make_cast(
        "mixed",
        "learner.agreement_max_share=0.9",
        "learner.replayed_per_group=4",
        "buffer.max_age=2",
        damaged="base",
    )
    rows = cast.play(8)
    wrong = [t for t in cast.gate.drawn if t.actor == DAMAGED]
    assert len(wrong) > 8 * 2 * 4, "replay brought none of it"
    assert not [t for t in cast.gate.admitted if t.actor == DAMAGED]
    assert sum(row["agreement/quarantined"] for row in rows) == len(wrong)
    audit = audit_buffer(cast.buffer)
    assert audit.ok, audit.discrepancies
    assert audit.counters.quarantined > 0


def test_past_the_share_the_run_stops_and_says_who_and_when(
    make_cast: MakeCast, tmp_path: Path
) -> None:
    cast = make_cast("mixed", damaged="base")
    with pytest.raises(SamplersDisagree, match=rf"{DAMAGED} at versions 1, 2, 3.* is off by"):
        cast.play(40)
    assert cast.learner.completed_steps >= 3
    kept = read_quarantine(tmp_path / "mixed/quarantine")
    assert {outcome.trajectory.actor for outcome in kept} == {DAMAGED}


def run(folder: Path, module: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a run to its end; whatever it started is ended with it."""
    command = [sys.executable, "-m", module, "train", "tasks/toy.toml", "--run", "test", *arguments]
    log = folder / "train.log"
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        return process.wait(timeout=240), log.read_text()
    finally:
        if process.poll() is None:
            for member in [
                *psutil.Process(process.pid).children(True),
                psutil.Process(process.pid),
            ]:
                member.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_distributed_run_with_a_damaged_actor_ends_and_names_it(tmp_path: Path) -> None:
    small = [
        "actors.groups_per_batch=2",
        "actors.group_size=4",
        "learner.groups_per_step=2",
        "learner.checkpoint_every_steps=2",
        "cluster.actors=2",
    ]
    status, output = run(tmp_path, "tests.damaged_run", *small, "learner.steps=100000")
    folder = tmp_path / "runs/test"
    state = json.loads((folder / "state.json").read_text())
    assert (status, state["phase"]) == (1, "failed"), output
    assert f"{DAMAGED} at version" in state["message"]
    assert "learner.agreement_tolerance_nats" in state["message"], state["message"]
    # Who and where is said while it goes on, and the learner is not started again and again.
    assert re.search(
        rf"learner: [48] trajectories quarantined: log q of {DAMAGED} at version", output
    )
    assert "replacing it" not in output and "Traceback" not in output, output
    kept = list(read_quarantine(folder / "quarantine"))
    assert {outcome.trajectory.actor for outcome in kept} == {DAMAGED}
    assert str(folder / "quarantine" / "0001.records") in state["message"]

    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    assert checkpoints, "no checkpoint from before was left"
    steps = int(checkpoints[-1].name.removeprefix("step-")) + 3
    on = ("--resume", "--local", f"learner.steps={steps}")
    status, output = run(tmp_path, "cluster", *small, *on)
    assert status == 0, output
    assert json.loads((folder / "state.json").read_text())["step"] == steps
