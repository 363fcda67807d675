"""A run directory from when the shipped LM lay in tasks/seed/model goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cluster.config.file import load_config
from cluster.config.validation import ConfigError
from cluster.run.assembly import identity_of, load_task
from cluster.run.directory import RunDirectory, read_scores
from learner.checkpoint import CheckpointMismatch, Checkpoints, Snapshot

WRITTEN = Path(__file__).parent / "run_before_move"


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    shutil.copytree(WRITTEN, tmp_path / "before_move")
    directory = RunDirectory("before_move", root=tmp_path)
    meta = json.loads((WRITTEN / "meta.json").read_text())
    snapshot = Snapshot(meta["version"], {"weight": torch.zeros(1)}, meta["facts"])
    Checkpoints(directory.checkpoints, identity=meta["identity"], keep=1).save(snapshot)
    return directory


def test_its_state_and_configuration_are_read(directory: RunDirectory) -> None:
    state = directory.state()
    assert state is not None and (state.phase, state.step) == ("done", 300)
    directory.check(resume=True)
    assert load_config(str(directory.config_file)).lm.model == "/srv/amortize/tasks/seed/model"
    moved = load_config(str(directory.config_file), ["lm.model=seed_lm/model"])
    assert Path(moved.lm.model).is_dir()


@pytest.mark.parametrize(
    ("batches", "completions", "limit"), [(2, 0, 96), (1, 48, 48), (3, 144, 144)]
)
def test_its_batches_in_flight_are_as_many_completions(
    directory: RunDirectory, batches: int, completions: int, limit: int
) -> None:
    written = directory.config_file.read_text()
    assert "max_in_flight = 2\n" in written
    earlier = written.replace("max_in_flight = 2\n", f"max_in_flight = {batches}\n")
    directory.config_file.write_text(earlier)
    actors = load_config(str(directory.config_file)).actors
    assert (actors.max_unstored, actors.in_flight_limit) == (completions, limit)
    override = [f"actors.max_in_flight={batches}"]  # beside the default of a later file
    toy = load_config("tasks/toy.toml").changed({"actors.max_in_flight": 3}).actors
    assert toy.max_unstored == 3 * toy.batch_size
    later = load_config("tasks/arithmetic.toml", override).actors
    assert later.in_flight_limit == batches * later.batch_size
    with pytest.raises(ConfigError, match="max_in_flight is the earlier name of max_unstored"):
        load_config("tasks/toy.toml", [*override, "actors.max_unstored=5"])


def test_its_checkpoint_belongs_to_a_run_on_the_same_weights_wherever_they_lie(
    directory: RunDirectory,
) -> None:
    config = load_config("tasks/arithmetic.toml")
    assert "tasks/seed" not in config.lm.model
    base, task = load_task(config)
    found = Checkpoints(directory.checkpoints, identity=identity_of(config, base, task), keep=1)
    assert Snapshot.decode(found.read()).version == 300

    other = load_config("tasks/arithmetic.toml", ["lora.rank=16"])
    refused = Checkpoints(directory.checkpoints, identity=identity_of(other, base, task), keep=1)
    with pytest.raises(CheckpointMismatch, match="lora"):
        refused.read()


def test_its_measurements_are_taken_again(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_scores(directory).before is None
    assert "another version" in capsys.readouterr().err
