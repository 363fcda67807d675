"""DeepSpeed ZeRO-2 on real gloo ranks takes the step of one process."""

import json
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from buffer.replay import DrawRequest
from cluster.config.file import load_config
from cluster.run.assembly import build_learner, load_task
from cluster.run.directory import RunDirectory
from learner.broadcast import RankZeroFailed
from learner.checkpoint import Checkpoints
from learner.engine import NonFiniteUpdate, TorchEngine
from lm.adapter import adapter_bytes, save_adapter
from lm.model import attach_adapter
from lm.process_group import RankLost
from tests.learner_toy import Published, UniformReplay, make_config, make_learner
from tests.ranks import run_ranks, wait_for

STEPS = 3
# The longest prompt group is above it, so three groups make three parts: one rank needs a filler.
TOKEN_BUDGET = 30
TIMEOUT_S = 12.0


class StarvedReplay:
    """Has nothing to draw."""

    def draw(self, request: DrawRequest) -> list[Any]:
        if request.stop():
            return []
        raise TimeoutError("no groups")

    def discard(self, trajectories: Any) -> None:
        raise AssertionError("nothing was drawn")


def exercise_rank(place: Any, folder: Path, log_z: str, loses: bool) -> None:
    """Steps, checkpoint, steps, restore, the same steps; at last rank 1 stalls where it `loses`."""
    # Imported in ranks alone: it changes global state.
    from learner import deepspeed_engine

    engines: list[Any] = []

    def make_engine(model: Any, config: Any) -> Any:
        engines.append(deepspeed_engine.DeepSpeedEngine(model, config, place))
        return engines[0]

    published = Published()
    learner, model = make_learner(
        replay=UniformReplay() if place.rank == 0 else None,
        weights=published,
        folder=folder / "checkpoints",
        make_engine=make_engine,
        token_budget=TOKEN_BUDGET,
        log_z=log_z,
    )
    metrics = [learner.step() for _ in range(STEPS)]
    save_file(engines[0].state(), folder / f"state-{place.rank}.safetensors")
    learner.checkpoint()
    after = [learner.step()["loss/value"] for _ in range(2)]
    learner.restore()
    restored = adapter_bytes(model)
    # Only rank 0's folder is looked into: here the other one's is another.
    unsaved, _ = make_learner(
        folder=folder / f"unsaved-{place.rank}", make_engine=lambda *_: engines[0]
    )
    if place.rank == 0:
        Checkpoints(folder / "unsaved-0", identity={}, keep=1).note_published(7)
    unsaved.take_up()
    report = {
        "begins_anew_at": unsaved.version,
        "metrics": metrics,
        "after": after,
        "again": [learner.step()["loss/value"] for _ in range(2)],
        "published": [version for _, version, _ in published.adapters],
    }
    if place.rank == 0:
        report["publishes_the_same"] = restored == published.adapters[STEPS - 1][0]
    if loses:
        report["lost_after_s"] = lose_rank_one(place, engines[0], learner, model, folder)
    else:
        engines[0].close()
    (folder / f"report-{place.rank}.json").write_text(json.dumps(report))


def lose_rank_one(place: Any, engine: Any, learner: Any, model: Any, folder: Path) -> float:
    """Rank 0 is stopped in a wait and then fails, and all hear of both; then rank 1 stalls.

    Returns the seconds until rank 0 says so.
    """
    learner.replay = StarvedReplay()
    answers = iter([False, True])
    learner.run(STEPS + 99, stop=lambda: next(answers))
    assert learner.completed_steps == STEPS + 2
    with pytest.raises(TimeoutError if place.rank == 0 else RankZeroFailed, match="no groups"):
        learner.step()
    start_s = monotonic()
    if place.rank == 0:
        loss = next(iter(adapter_parameters(model))).sum
        with pytest.raises(RankLost, match=r"learner rank 0 of 2 at .* lost its peers in update"):
            engine.update([loss], learning_rate=0.1)
        (folder / "lost").touch()
    else:
        wait_for((folder / "lost").exists)
    return monotonic() - start_s


def start_rank(place: Any, folder: Path) -> None:
    """The first step of a learner with a start, at a learning rate of 0."""
    from learner import deepspeed_engine

    engines: list[Any] = []

    def make_engine(model: Any, settings: Any) -> Any:
        engines.append(deepspeed_engine.DeepSpeedEngine(model, settings, place))
        return engines[0]

    config = load_config("tasks/toy.toml", [f"learner.start_from={folder / 'start'}"])
    base, task = load_task(config)
    learner = build_learner(
        config,
        base=base,
        task=task,
        directory=RunDirectory("started", root=folder),
        make_engine=make_engine,
        buffer=UniformReplay(),
        weights=Published(),
        warn=print,
        gated=False,
    )
    loss = next(iter(adapter_parameters(learner.model))).sum
    engines[0].update([loss], learning_rate=0.0)
    (folder / f"kept-{place.rank}").write_bytes(adapter_bytes(learner.model))
    engines[0].close()


def test_deepspeed_ranks_keep_what_they_start_from_after_their_first_step(tmp_path: Path) -> None:
    config = load_config("tasks/toy.toml")
    base, _ = load_task(config)
    started = attach_adapter(base, config.lora, seed=1)
    with torch.no_grad():
        for parameter in adapter_parameters(started):
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_adapter(started, tmp_path / "start", base.fingerprint)
    run_ranks(start_rank, 2, tmp_path, TIMEOUT_S)
    for rank in range(2):
        assert (tmp_path / f"kept-{rank}").read_bytes() == adapter_bytes(started)


def adapter_parameters(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("num_ranks", "log_z", "loses"),
    [(1, "group", False), (2, "group", True), (2, "learned", False)],
)
def test_deepspeed_ranks_take_the_step_of_one_process(
    num_ranks: int, log_z: str, loses: bool, tmp_path: Path
) -> None:
    run_ranks(exercise_rank, num_ranks, tmp_path, TIMEOUT_S, log_z, loses)
    reports = [json.loads((tmp_path / f"report-{r}.json").read_text()) for r in range(num_ranks)]
    reference, _ = make_learner(log_z=log_z)
    expected = [reference.step() for _ in range(STEPS)]
    state = reference.engine.state()
    for rank, report in enumerate(reports):
        for mine, theirs in zip(report["metrics"], expected, strict=True):
            for key in ("loss/value", "loss/log_z_nats", "optim/grad_norm", "batch/trajectories"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (rank, key)
        saved = load_file(tmp_path / f"state-{rank}.safetensors")
        assert saved.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-5, msg=name)
        assert report["again"] == report["after"]
        assert report["begins_anew_at"] == 8
        # Versions 4 and 5 are used up: what follows the restored version 3 gets new names.
        assert report["published"] == ([1, 2, 3, 4, 5, 7, 8] if rank == 0 else [])
    assert reports[0]["publishes_the_same"]
    if loses:
        assert TIMEOUT_S - 1 < reports[0]["lost_after_s"] < TIMEOUT_S + 5


def make_engine(**changes: Any) -> tuple[TorchEngine, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return TorchEngine(model, make_config(**changes)), model


def square_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = model(rows).square().sum()
    return total


def test_accumulated_micro_batches_equal_one_batch() -> None:
    rows = torch.randn(6, 3)
    whole, whole_model = make_engine()
    parts, parts_model = make_engine()
    for _ in range(3):
        whole.update([partial(square_of, whole_model, rows)], learning_rate=0.1)
        parts.update([partial(square_of, parts_model, row) for row in rows], learning_rate=0.1)
    torch.testing.assert_close(whole_model.weight, parts_model.weight)


def test_gradients_are_clipped_and_the_norm_before_is_returned() -> None:
    engine, model = make_engine(clip_norm=0.5)
    rows = 100 * torch.ones(1, 3)
    norm = engine.update([lambda: model(rows).square().sum()], learning_rate=0.1)
    assert norm > 100
    assert model.weight.grad is not None and model.bias.grad is not None
    clipped = torch.cat([model.weight.grad.flatten(), model.bias.grad.flatten()]).norm()
    assert clipped.item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(value: float) -> None:
    engine, model = make_engine()
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteUpdate, match="last checkpoint is good"):
        engine.update([lambda: (model.weight * value).sum()], learning_rate=0.1)
    assert torch.equal(model.weight, before)


def test_a_model_without_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="attach an adapter"):
        TorchEngine(nn.Linear(2, 2).requires_grad_(False), make_config())
