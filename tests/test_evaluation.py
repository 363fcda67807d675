"""Measuring: the base LM is loaded once for all of it, and is the same afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lm.model
from cluster.config.file import PROJECT_ROOT, load_config
from cluster.config.schema import RunConfig
from cluster.run.evaluation import evaluate, evaluation_context
from lm.adapter import adapter_off, save_adapter
from lm.config import LMConfig, LoRAConfig
from lm.model import attach_adapter, load_base
from lm.shared import SharedModel
from tasks.registry import build_task

SMALL = (
    *("evaluation.max_items=2", "evaluation.samples=2", "evaluation.diversity_items=1"),
    *("posterior.prompts=1", "posterior.samples=10", "posterior.draws=10"),
)


def adapter_of(config: LMConfig, lora: LoRAConfig, folder: Path) -> Path:
    """An adapter that changes what the base says."""
    base = load_base(config)
    model = attach_adapter(base, lora, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, base.fingerprint)
    return folder


class Loads:
    """Counts how often weights are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        read = lm.model.AutoModelForCausalLM.from_pretrained

        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            return read(*arguments, **named)

        monkeypatch.setattr(lm.model.AutoModelForCausalLM, "from_pretrained", counted)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("infilling", ()),
        ("continuation", ("evaluation.decoding=beam",)),
        ("arithmetic", ()),
        ("subjectivity", ()),
        ("subjectivity", ("learner.objective=sft",)),
        ("toy", ()),
        ("random_number", ("posterior.max_nodes=100",)),
    ],
)
def test_measuring_an_adapter_loads_the_base_once(
    task: str, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(f"tasks/{task}.toml", [*SMALL, *overrides])
    adapter = adapter_of(config.lm, config.lora, tmp_path / "adapter")
    loads = Loads(monkeypatch)
    found = evaluate(config, adapter=adapter, step=7)
    assert loads.count == 1
    assert found.metrics and (found.task, found.step) == (task, 7)


def test_a_task_is_built_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(monkeypatch)
    config = load_config("tasks/infilling.toml")
    context = evaluation_context(config, None)
    assert build_task(config.task, context.language_model.tokenizer, seed=config.seed).prompts
    assert loads.count == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tasks/toy/model", "seed_lm/model"])
def test_an_adapter_leaves_the_base_as_it_found_it(model: str, dtype: str, tmp_path: Path) -> None:
    config = LMConfig.model_validate(
        {"model": str(PROJECT_ROOT / model), "device": "cpu", "dtype": dtype}
    )
    adapter = adapter_of(config, LoRAConfig(), tmp_path / "adapter")
    shared = SharedModel(config)
    text = torch.tensor([[1, 2, 3, 4]])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return shared.base.model(text).logits

    plain = logits()
    for _ in range(2):
        with shared.beside(adapter) as policy:
            beside = logits()
            with adapter_off(policy):
                assert torch.equal(logits(), plain)
        with shared.with_adapter(adapter):
            folded = logits()
        assert (beside - plain).abs().max() > 0.01
        torch.testing.assert_close(folded, beside, atol=1e-4, rtol=1e-3)
        with shared.with_adapter(None):
            assert torch.equal(logits(), plain)
        assert torch.equal(logits(), plain)


def test_the_stages_of_measuring_are_told() -> None:
    stages: list[str] = []
    config: RunConfig = load_config("tasks/toy.toml", [*SMALL, "posterior.prompts=2"])
    evaluate(config, adapter=None, progress=stages.append)
    assert list(dict.fromkeys(stage.split(":")[0] for stage in stages if "prompt" in stage)) == [
        "prompt 1 of 2",
        "prompt 2 of 2",
    ]
    stages.clear()
    evaluate(load_config("tasks/arithmetic.toml", SMALL), adapter=None, progress=stages.append)
    assert any("rationales for each of 6 questions" in stage for stage in stages)
