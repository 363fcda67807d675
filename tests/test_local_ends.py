"""How a run in one process ends, or is refused, where it cannot go on."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from buffer.memory import MemoryStore
from cluster.config.file import ConfigError, load_config
from cluster.config.project import UserError
from cluster.run import local
from cluster.run.directory import RunDirectory
from cluster.run.local import LocalRun
from cluster.run.preflight import check_before_start, check_model_and_data
from cluster.run.session import BufferAddress
from learner.config import LearnerConfig
from learner.engine import NonFiniteUpdate, TorchEngine, trainable_parameters
from lm.adapter import adapter_bytes, save_adapter
from lm.model import attach_adapter, load_base

MEMORY = ["buffer.kind=memory", "learner.groups_per_step=3", "actors.groups_per_batch=2"]


def start(folder: Path, *changes: str) -> LocalRun:
    return LocalRun(
        load_config("tasks/toy.toml", [*MEMORY, *changes]),
        directory=RunDirectory("test", root=folder),
        buffer=BufferAddress(memory=MemoryStore()),
        report=print,
    )


def test_a_learner_that_diverged_leaves_the_last_good_checkpoint_and_no_adapter(
    tmp_path: Path,
) -> None:
    settings = ["learner.steps=5", "learner.checkpoint_every_steps=2"]
    run = start(tmp_path, *settings)
    while run.learner_status["step"] < 3:
        run.tick()
    with torch.no_grad():
        for parameter in trainable_parameters(run._learner.model).values():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteUpdate):
        while True:
            run.tick()
    run.stop(timeout_s=30)
    kept = [path.name for path in (tmp_path / "test" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000002"]
    assert not (tmp_path / "test" / "adapter").exists()
    again = start(tmp_path, *settings)
    assert again.learner_status == {"step": 2, "version": 2}
    while not again.finished:
        again.tick()
    again.stop(timeout_s=30)
    assert (tmp_path / "test" / "adapter").exists()


def test_a_run_may_start_from_an_adapter_and_learns_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []  # by engines, of which DeepSpeed's copies the weights as it begins

    def make_engine(model: nn.Module, config: LearnerConfig) -> TorchEngine:
        seen.append(adapter_bytes(model))
        return TorchEngine(model, config)

    monkeypatch.setattr(local, "TorchEngine", make_engine)
    config = load_config("tasks/toy.toml")
    base = load_base(config.lm)
    trained = attach_adapter(base, config.lora, seed=1)
    with torch.no_grad():
        for parameter in trainable_parameters(trained).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_adapter(trained, tmp_path / "adapter", base.fingerprint)
    settings = [f"learner.start_from={tmp_path / 'adapter'}", "learner.steps=1"]
    run = start(tmp_path, *settings)
    assert seen == [adapter_bytes(run._learner.model)] == [adapter_bytes(trained)]
    assert run.learner_status == {"step": 0, "version": 1}  # 0 is the base
    while not run.finished:
        run.tick()
    run.stop(timeout_s=30)
    [row] = run.learner_rows  # samples were held to what the learner began with
    assert row["agreement/checked"] > 0 and row["agreement/quarantined"] == 0
    assert row["policy/age_max_versions"] == 0
    learned = adapter_bytes(run._learner.model)
    assert learned != adapter_bytes(trained)
    shutil.rmtree(tmp_path / "adapter")
    again = start(tmp_path, *settings)  # its checkpoint has the last word
    assert adapter_bytes(again._learner.model) == learned


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["buffer.fresh_capacity=2"], "buffer.fresh_capacity is 2"),
        (["actors.max_ready_groups=2"], "actors.max_ready_groups is 2"),
        (["learner.publish_every_steps=9", "buffer.max_age=7"], "publish more often"),
    ],
)
def test_a_configuration_that_can_make_no_step_is_refused(changes: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config("tasks/toy.toml", [*MEMORY, *changes])
    load_config("tasks/toy.toml", [*MEMORY, "learner.publish_every_steps=8", "buffer.max_age=7"])
    load_config("tasks/arithmetic.toml", ["learner.objective=sft", *changes])


def test_a_buffer_in_memory_is_refused_over_ray(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add --local"):
        check_before_start(
            load_config("tasks/toy.toml", MEMORY),
            RunDirectory("test", root=tmp_path),
            resume=False,
            address=None,
            local=False,
        )


def test_a_buffer_with_less_room_than_prompts_is_refused() -> None:
    with pytest.raises(UserError, match=r"buffer\.capacity \(2\) is below the \d+ prompts"):
        check_model_and_data(load_config("tasks/arithmetic.toml", ["buffer.capacity=2"]))
