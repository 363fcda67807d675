"""Learned log Z(X): what the head converges to, where it is kept, and where it must not go."""

from pathlib import Path
from typing import Any

import pytest
import torch

from buffer.config import BufferConfig
from buffer.server import RedisServer
from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.run import assembly as roles
from cluster.run.directory import RunDirectory
from cluster.run.local import LocalRun
from cluster.run.preflight import check_model_and_data
from cluster.run.session import BufferAddress
from learner.checkpoint import CheckpointMismatch
from learner.engine import StateMismatch, TorchEngine
from learner.log_z import LogZUnused, attach_log_z, check_log_z
from learner.objectives.subtb import SubTB
from learner.objectives.tb import TrajectoryBalance
from lm.actions import ActionSpace
from lm.adapter import adapter_bytes, load_adapter, load_adapter_bytes, save_adapter
from lm.scoring import completion_log_probs
from tests.learner_toy import (
    ACTIONS,
    PROMPTS,
    STRINGS,
    UniformReplay,
    adapter_of,
    log_reward_of,
    make_config,
    make_learner,
    make_policy,
)

OBJECTIVES = (TrajectoryBalance(), SubTB())


def predicted(model: Any) -> list[float]:
    """What the head of `model` says of every prompt."""
    with torch.no_grad():
        scored = completion_log_probs(
            model,
            ACTIONS,
            list(PROMPTS.values()),
            [[1, 1]] * len(PROMPTS),
            [[False] * 2] * len(PROMPTS),
        )
        log_z_B: torch.Tensor = model.log_z(scored.prompt_state_BH)
    return log_z_B.tolist()


def exact(prompt_key: str) -> float:
    rewards = [log_reward_of(prompt_key, string) for string in STRINGS]
    return torch.tensor(rewards).logsumexp(0).item()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_head_converges_to_the_exact_log_z_of_every_prompt(objective: Any) -> None:
    learner, model = make_learner(
        replay=UniformReplay(group_size=8),
        replayed_per_group=0,
        learning_rate=0.02,
        steps=150,
        decay="linear",
        objective=objective,
        log_z="learned",
    )
    for _ in range(150):
        learner.step()
    truth = [exact(key) for key in PROMPTS]
    assert max(truth) - min(truth) > 0.3
    assert predicted(model) == pytest.approx(truth, abs=0.05)


def test_it_starts_from_what_the_first_groups_estimate(tmp_path: Path) -> None:
    learned, model = make_learner(log_z="learned")
    group, _ = make_learner()
    started = learned.step()["loss/log_z_nats"]
    assert started == pytest.approx(group.step()["loss/log_z_nats"], rel=1e-5)
    assert started < -10
    moved = predicted(model)
    learned.step()
    assert predicted(model) != pytest.approx(moved, abs=1e-4)


def test_splitting_into_micro_batches_changes_nothing() -> None:
    whole, whole_model = make_learner(log_z="learned")
    parts, parts_model = make_learner(log_z="learned", token_budget=1)
    for _ in range(3):
        one, many = whole.step(), parts.step()
        assert many["loss/value"] == pytest.approx(one["loss/value"], rel=1e-4)
    assert predicted(parts_model) == pytest.approx(predicted(whole_model), abs=1e-3)


def test_it_does_not_change_the_policy_it_reads() -> None:
    model = make_policy()
    attach_log_z(model)
    scored = completion_log_probs(model, ACTIONS, [[5, 6]], [[1]], [[False]])
    model.log_z(scored.prompt_state_BH).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" in n)
    assert model.log_z.weight.grad is not None


def test_it_comes_back_from_a_checkpoint_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, straight_model = make_learner(log_z="learned")
    for _ in range(4):
        straight.step()
    first, _ = make_learner(log_z="learned", folder=tmp_path)
    for _ in range(2):
        first.step()
    first.checkpoint()
    second, model = make_learner(log_z="learned", folder=tmp_path)
    second.restore()
    for _ in range(2):
        second.step()
    wanted, got = adapter_of(straight_model), adapter_of(model)
    assert "log_z.weight" in wanted and wanted["log_z.weight"].abs().min() > 0
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_checkpoint_without_it_is_refused_by_name(tmp_path: Path) -> None:
    without, _ = make_learner(folder=tmp_path)
    without.checkpoint()
    with_it, _ = make_learner(folder=tmp_path, log_z="learned")
    with pytest.raises(StateMismatch, match=r"log_z\.bias"):
        with_it.restore()
    identity = {"base": "tiny", "log_z": "learned"}
    with_it, _ = make_learner(folder=tmp_path, log_z="learned", identity=identity)
    with pytest.raises(CheckpointMismatch, match="log_z = None, this run has learned"):
        with_it.restore()


def test_it_is_in_no_adapter_that_is_published_or_saved(tmp_path: Path) -> None:
    plain, model = make_policy(), make_policy()
    before = adapter_bytes(plain)
    attach_log_z(model)
    TorchEngine(model, make_config(log_z="learned"))
    assert adapter_bytes(model) == before
    save_adapter(model, tmp_path, "tiny")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    with torch.no_grad():
        model.log_z.weight.fill_(3.0)
    load_adapter_bytes(model, before)
    assert (model.log_z.weight == 3.0).all()


@pytest.mark.parametrize("objective", ["subtb", "db", "tb", "raptb"])
@pytest.mark.parametrize("min_len", [0, 1])
def test_it_is_refused_where_no_term_of_the_loss_has_it(min_len: int, objective: str) -> None:
    actions = ActionSpace(stop_token=0, legal_tokens=(1, 2), min_len=min_len, max_len=3)
    config = make_config(objective=objective, log_z="learned")
    if min_len == 0 and objective in ("subtb", "db"):
        with pytest.raises(LogZUnused, match='log_z = "group"'):
            check_log_z(config, actions)
    else:
        check_log_z(config, actions)
    check_log_z(make_config(objective=objective), actions)


def test_a_run_is_refused_before_it_starts_where_it_would_be_idle() -> None:
    with pytest.raises(LogZUnused):
        check_model_and_data(load_config("tasks/toy.toml", ["learner.log_z=learned"]))


def test_a_whole_run_learns_it_resumes_it_and_leaves_a_plain_adapter(tmp_path: Path) -> None:
    config = load_config(
        "tasks/toy.toml", ["task.min_len=2", "learner.log_z=learned", "learner.steps=2"]
    )
    server = RedisServer.start(tmp_path / "buffer", run="z", config=BufferConfig())
    try:
        first = start_run(config, tmp_path, server)
        while not first.finished:
            first.tick()
        assert first.learner_rows[-1]["loss/log_z_nats"] < -1
        first.stop(timeout_s=30)
        resumed = start_run(config, tmp_path, server)
        models: list[Any] = [first._learner.model, resumed._learner.model]
        wanted, got = (model.log_z.state_dict() for model in models)
        assert wanted["weight"].abs().max() > 0
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)
        resumed.stop(timeout_s=30)
        base, _ = roles.load_task(config)
        assert "log_z.weight" not in adapter_of(load_adapter(base, tmp_path / "z" / "adapter"))
        without = config.model_copy(
            update={"learner": config.learner.model_copy(update={"log_z": "group"})}
        )
        with pytest.raises(CheckpointMismatch, match="log_z = learned, this run has None"):
            start_run(without, tmp_path, server)
    finally:
        server.stop(timeout_s=30)


def start_run(config: RunConfig, folder: Path, server: RedisServer) -> LocalRun:
    return LocalRun(
        config,
        directory=RunDirectory("z", root=folder),
        buffer=BufferAddress(url=server.url, password=server.password),
        report=print,
    )
