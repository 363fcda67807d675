"""DeepSpeed ZeRO-2 on real gloo ranks takes the step of one process."""

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from learner.engine import NonFiniteUpdate, TorchEngine
from learner.exchange import RankZeroFailed
from tests.learner_toy import Published, UniformReplay, make_config, make_learner

STEPS = 3
# The longest prompt group is above it, so three groups make three parts: one rank needs a filler.
TOKEN_BUDGET = 30
TIMEOUT_S = 12.0


class StarvedReplay:
    """Has nothing to draw."""

    def draw(self, **limits: Any) -> list[Any]:
        raise TimeoutError("no groups")

    def discard(self, trajectories: Any) -> None:
        raise AssertionError("nothing was drawn")


def rank_main(rank: int, num_ranks: int, port: int, folder: Path, log_z: str) -> None:
    """One rank of `exercise_rank`; leaves a report, or an error."""
    # Imported in the child alone: it takes seconds and changes global state.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from learner import deepspeed_engine

    torch.set_num_threads(1)
    place = deepspeed_engine.Rendezvous("127.0.0.1", port, rank, num_ranks, TIMEOUT_S)
    try:
        # The deadline is for ranks that are up, not for the imports of a busy machine.
        meet(folder, rank, num_ranks)
        report = exercise_rank(place, deepspeed_engine, folder, log_z)
        (folder / f"report-{rank}.json").write_text(json.dumps(report))
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    os._exit(0)


def meet(folder: Path, rank: int, num_ranks: int) -> None:
    (folder / f"up-{rank}").touch()
    wait_for(lambda: len(list(folder.glob("up-*"))) == num_ranks)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = monotonic() + 60
    while not condition():
        assert monotonic() < deadline_s, "the other rank did not come"
        sleep(0.02)


def exercise_rank(place: Any, deepspeed_engine: Any, folder: Path, log_z: str) -> dict[str, Any]:
    """Steps, checkpoint, steps, restore, the same steps; at last rank 1 stalls."""
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
    report = {
        "metrics": metrics,
        "after": after,
        "again": [learner.step()["loss/value"] for _ in range(2)],
        "published": [version for _, version, _ in published.adapters],
    }
    if place.num_ranks == 1:
        engines[0].close()
        return report
    learner._replay = StarvedReplay()
    with pytest.raises(TimeoutError if place.rank == 0 else RankZeroFailed, match="no groups"):
        learner.step()
    if place.rank == 0:
        loss = next(iter(adapter_parameters(model))).sum
        start_s = monotonic()
        with pytest.raises(deepspeed_engine.RankLost, match="rank 0 of 2 lost its peers in update"):
            engines[0].update([loss], learning_rate=0.1)
        report["lost_after_s"] = monotonic() - start_s
        (folder / "lost").touch()
    else:
        wait_for((folder / "lost").exists)
    return report


def adapter_parameters(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def run_ranks(num_ranks: int, folder: Path, log_z: str) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=rank_main, args=(rank, num_ranks, port, folder, log_z))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not errors, "\n".join(errors)
    return [json.loads((folder / f"report-{r}.json").read_text()) for r in range(num_ranks)]


@pytest.mark.parametrize(("num_ranks", "log_z"), [(1, "group"), (2, "group"), (2, "learned")])
def test_deepspeed_ranks_take_the_step_of_one_process(
    num_ranks: int, log_z: str, tmp_path: Path
) -> None:
    reports = run_ranks(num_ranks, tmp_path, log_z)
    reference, _ = make_learner(log_z=log_z)
    expected = [reference.step() for _ in range(STEPS)]
    state = reference._engine.state()
    for rank, report in enumerate(reports):
        for mine, theirs in zip(report["metrics"], expected, strict=True):
            for key in ("loss/value", "loss/log_z_nats", "optim/grad_norm", "batch/trajectories"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (rank, key)
        saved = load_file(tmp_path / f"state-{rank}.safetensors")
        assert saved.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-5, msg=name)
        assert report["again"] == report["after"]
        # Versions 4 and 5 are used up: what follows the restored version 3 gets new names.
        assert report["published"] == ([1, 2, 3, 4, 5, 7, 8] if rank == 0 else [])
    if num_ranks > 1:
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
