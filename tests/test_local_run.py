"""The whole loop in one process: what comes out of it is what the mathematics says."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

import lm.shared
from bench.audit import audit_buffer
from buffer.config import BufferConfig
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer
from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.distributed.telemetry import INSTRUMENTS, Source
from cluster.run import assembly as roles
from cluster.run import local
from cluster.run.directory import RunDirectory
from cluster.run.local import LocalRun
from cluster.run.session import BufferAddress
from lm.config import LMConfig, LoRAConfig
from lm.model import LanguageModel, attach_adapter, load_base
from lm.scoring import completion_log_probs
from reward.request import ScoreItem
from tests.buffer_toy import replay_of
from tests.naive_rewards import naive_log_rewards

Finished = tuple[LocalRun, Path, RunConfig, ReplayBuffer]

SMALL = [
    "actors.groups_per_batch=2",
    "actors.group_size=4",
    "learner.groups_per_step=2",
    "learner.replayed_per_group=2",
    "learner.learning_rate=0.01",
    "learner.warmup_steps=0",
]


def start(config: RunConfig, folder: Path, server: RedisServer) -> LocalRun:
    return LocalRun(
        config,
        directory=RunDirectory("test", root=folder),
        buffer=BufferAddress(url=server.url, password=server.password),
        report=print,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RedisServer]:
    running = RedisServer.start(folder / "buffer", run="test", config=BufferConfig())
    yield running
    running.stop(timeout_s=30)


@pytest.fixture(scope="module")
def finished(folder: Path, server: RedisServer) -> Finished:
    """A run of five steps, its folder, its configuration and a client of its buffer."""
    config = load_config("tasks/arithmetic.toml", [*SMALL, "learner.steps=5"])
    run = start(config, folder, server)
    while not run.finished:
        run.tick()
    run.stop(timeout_s=30)
    address = BufferAddress(url=server.url, password=server.password)
    buffer = roles.build_buffer(config, run="test", place=address)
    return run, folder, config, buffer


def test_log_q_recomputed_by_the_learner_is_what_the_sampler_recorded(finished: Finished) -> None:
    run, *_ = finished
    gaps = [row["agreement/max_nats"] for row in run.learner_rows if "agreement/max_nats" in row]
    assert gaps and max(gaps) < 1e-4


def test_the_learner_measures_all_that_prometheus_is_told_of_it(finished: Finished) -> None:
    run, *_ = finished
    told = {instrument.key for instrument in INSTRUMENTS[Source.LEARNER]} - {"step", "version"}
    assert told <= {key for row in run.learner_rows for key in row}


def test_stored_rewards_are_those_of_naive_passes_over_every_prefix(finished: Finished) -> None:
    _, _, config, buffer = finished
    base, task = roles.load_task(config)
    sampled = [t for t in replay_of(buffer) if t.behaviour != "demonstration"][:6]
    assert len(sampled) == 6
    for trajectory in sampled:
        item = ScoreItem(
            context=np.concatenate(
                [np.array(task.reward_query.context, dtype=np.int32), trajectory.prompt]
            ),
            completion=trajectory.completion,
            stops=trajectory.stops,
            answer=trajectory.answer,
        )
        [naive_S] = naive_log_rewards(base.model, [item])
        np.testing.assert_allclose(trajectory.log_reward, naive_S, atol=1e-4)


def test_the_adapter_that_is_left_is_the_policy_that_was_trained(finished: Finished) -> None:
    run, folder, config, _ = finished
    base, task = roles.load_task(config)
    prompt = list(task.prompts[0].prompt)
    completion = list(task.demonstrations[0].completion)
    from_tool = list(task.demonstrations[0].from_tool)
    adapted = PeftModel.from_pretrained(load_base(config.lm).model, folder / "test" / "adapter")
    with torch.no_grad():
        kept, trained, untrained = (
            completion_log_probs(model, task.actions, [prompt], [completion], [from_tool])
            for model in (adapted, run._learner.model, base.model)
        )
    torch.testing.assert_close(kept.log_pf_BT, trained.log_pf_BT)
    torch.testing.assert_close(kept.log_stop_BS, trained.log_stop_BS)
    assert not torch.allclose(kept.log_pf_BT, untrained.log_pf_BT, atol=1e-2)


def test_every_demonstration_is_in_replay_and_the_audit_balances(finished: Finished) -> None:
    _, _, config, buffer = finished
    _, task = roles.load_task(config)
    seeded = {t.prompt_key for t in replay_of(buffer) if t.behaviour == "demonstration"}
    assert len(seeded) >= 0.9 * len(task.demonstrations)  # a better near-duplicate may replace one
    audit = audit_buffer(buffer)
    assert audit.ok, audit.discrepancies


def test_a_second_sitting_goes_on_where_the_first_one_ended(
    finished: Finished, server: RedisServer, tmp_path: Path
) -> None:
    _, folder, _, buffer = finished
    longer = load_config("tasks/arithmetic.toml", [*SMALL, "learner.steps=6"])
    stored = buffer.stats().replay_size
    again = start(longer, folder, server)
    assert again.learner_status == {"step": 5, "version": 5}
    while not again.finished:
        again.tick()
    again.stop(timeout_s=30)
    assert [row["progress/step"] for row in again.learner_rows] == [6.0]
    assert buffer.stats().replay_size >= stored


def test_the_base_is_loaded_once_and_each_part_has_layers_of_its_own(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[LanguageModel] = []

    def load(config: LMConfig) -> LanguageModel:
        loaded.append(load_base(config))
        return loaded[-1]

    monkeypatch.setattr(lm.shared, "load_base", load)
    run = start(load_config("tasks/arithmetic.toml", SMALL), tmp_path, server)
    [base] = loaded
    assert any("lora" in name for name, _ in run._base.model.named_parameters())  # the learner's
    assert not any("lora" in name for name, _ in base.model.named_parameters())

    pristine = load_base(load_config("tasks/arithmetic.toml").lm)
    shared, own = local.twin(pristine), local.twin(pristine, own_weights=True)
    for mine, theirs, copied in zip(
        *(model.model.parameters() for model in (pristine, shared, own)), strict=True
    ):
        assert mine is theirs and mine is not copied and torch.equal(mine, copied)
    attach_adapter(shared, LoRAConfig(), seed=0)
    assert not any("lora" in name for name, _ in pristine.model.named_parameters())


def test_a_run_that_imitates_has_the_learner_alone_and_comes_to_its_end(
    server: RedisServer, tmp_path: Path
) -> None:
    config = load_config("tasks/arithmetic.toml", ["learner.objective=sft", "learner.steps=3"])
    run = start(config, tmp_path, server)
    while not run.finished:
        run.tick()
    run.stop(timeout_s=30)
    assert run.counts()["desired"] == {"actors": 0, "replicas": 0} and run.actor_totals() == {}
    losses = [row["loss/value"] for row in run.learner_rows]
    assert losses[2] < losses[0]
    assert {row["batch/trajectories"] for row in run.learner_rows} == {64.0}
