"""Checkpoints: bit-for-bit resume, refusal of what does not belong, survival of what breaks."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from learner.checkpoint import (
    CheckpointDamaged,
    CheckpointMismatch,
    Checkpoints,
    Snapshot,
)
from learner.engine import StateMismatch, TorchEngine
from tests.learner_toy import adapter_of, make_learner


def make_snapshot(version: int) -> Snapshot:
    return Snapshot(version, {"parameter/w": torch.full((3,), float(version))}, {"seed": 2**100})


def make_checkpoints(folder: Path, keep: int = 2, base: str = "abc") -> Checkpoints:
    return Checkpoints(folder, identity={"base": base}, keep=keep)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, num_steps: int
) -> None:
    straight, straight_model = make_learner()
    expected = [straight.step() for _ in range(2 * num_steps)]

    first, _ = make_learner(folder=tmp_path)
    for _ in range(num_steps):
        first.step()
    first.checkpoint()
    second, resumed_model = make_learner(folder=tmp_path)
    with torch.no_grad():
        for parameter in adapter_of(resumed_model).values():
            parameter.zero_()
    second.restore()
    assert second.version == num_steps
    for metrics in expected[num_steps:]:
        resumed = second.step()
        same = {key for key in metrics if not key.startswith("time/")}
        assert {key: resumed[key] for key in same} == {key: metrics[key] for key in same}
    wanted, got = adapter_of(straight_model), adapter_of(resumed_model)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert torch.equal(torch.get_rng_state(), torch.get_rng_state())


def test_random_states_are_restored(tmp_path: Path) -> None:
    learner, _ = make_learner(folder=tmp_path)
    torch.manual_seed(5)
    learner.checkpoint()
    expected = torch.rand(3)
    torch.manual_seed(6)
    learner.restore()
    assert torch.equal(torch.rand(3), expected)


def test_a_snapshot_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    checkpoints = make_checkpoints(tmp_path / "new" / "folder")
    checkpoints.save(make_snapshot(7))
    restored = Snapshot.decode(checkpoints.read())
    assert (restored.version, restored.facts) == (7, {"seed": 2**100})
    assert torch.equal(restored.tensors["parameter/w"], torch.full((3,), 7.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = make_checkpoints(tmp_path, keep=2)
    for version in (1, 2, 10, 2):
        checkpoints.save(make_snapshot(version))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert Snapshot.decode(checkpoints.read()).version == 10


def test_a_crash_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(make_snapshot(1))

    def lose_power(*paths: object) -> None:
        raise OSError("power lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lose_power)
        with pytest.raises(OSError, match="power lost"):
            checkpoints.save(make_snapshot(2))
    assert Snapshot.decode(checkpoints.read()).version == 1
    checkpoints.save(make_snapshot(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_version_that_a_full_disk_does_not_take_is_told_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as caught:
        make_checkpoints(tmp_path).note_published(3)
    assert Path(caught.value.filename).parent == tmp_path


def test_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="start without resuming"):
        make_checkpoints(tmp_path).read()


def test_a_checkpoint_of_another_base_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, base="abc").save(make_snapshot(1))
    with pytest.raises(CheckpointMismatch, match="base = abc, this run has xyz"):
        make_checkpoints(tmp_path, base="xyz").read()


def test_an_altered_or_missing_file_is_named(tmp_path: Path) -> None:
    checkpoints = make_checkpoints(tmp_path)
    state = checkpoints.save(make_snapshot(1)) / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"state\.safetensors was altered"):
        checkpoints.read()
    state.unlink()
    with pytest.raises(CheckpointDamaged, match="step-00000001 is unreadable"):
        checkpoints.read()


def test_another_format_is_refused(tmp_path: Path) -> None:
    checkpoints = make_checkpoints(tmp_path)
    meta = checkpoints.save(make_snapshot(1)) / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointMismatch, match="format 99"):
        checkpoints.read()


def test_a_state_of_other_shapes_is_refused_before_anything_changes() -> None:
    learner, model = make_learner()
    engine = TorchEngine(model, learner.config)
    state = engine.state()
    name = next(name for name in state if name.startswith("parameter/"))
    before = adapter_of(model)
    with pytest.raises(StateMismatch, match="restore with the adapter settings"):
        engine.load_state(state | {name: torch.zeros(2, 2)})
    assert all(torch.equal(before[key], value) for key, value in adapter_of(model).items())
