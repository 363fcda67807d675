"""A base is held against plain passes before it is trusted; which families agree."""

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lm.config import LMConfig
from lm.hub import ModelUnusable
from lm.model import LanguageModel, context_limit, load_base
from reward.probe import check_base, longest_window, probe
from tests.families import FAMILIES, REFUSED, tiny_model

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_agrees_is_taken(family: str) -> None:
    model = tiny_model(family)
    assert context_limit(model) == 96, "a window is no limit"
    probe(model, family)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_is_refused_by_name(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ModelUnusable) as caught:
        probe(model, "folder")
    assert f"model 'folder', a {type(model).__name__}," in str(caught.value)
    assert re.search(r"packed pass (is [0-9.]+ nats a token off|fails: )", str(caught.value))
    assert "lm.probe = false" in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("lm.scoring.attention_mask", "learner's packed pass"),
        ("reward.packed.attention_mask", "packed scoring pass"),
        ("lm.cache.attention_mask", "sampler's cached decoding"),
    ],
)
def test_each_pass_is_looked_at(monkeypatch: pytest.MonkeyPatch, broken: str, named: str) -> None:
    def every_column(
        model: PreTrainedModel, sees_RQK: torch.Tensor, *positions: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros_like(sees_RQK, dtype=torch.float32)[:, None]

    model = tiny_model("gpt2")
    monkeypatch.setattr(broken, every_column)
    with pytest.raises(ModelUnusable, match=rf"the {named} (is|fails)"):
        probe(model, "folder")


def test_a_model_that_says_nan_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelUnusable, match="is nan nats a token off"):
        probe(model, "folder")


def test_texts_are_longer_than_any_window_as_far_as_there_are_positions() -> None:
    assert longest_window(tiny_model("gemma3_text")) == 12
    assert longest_window(tiny_model("gpt_neo")) == 12
    assert longest_window(tiny_model("mixtral")) == 0


def test_the_shipped_model_passes_and_the_key_skips_the_probe() -> None:
    base = load_base(LMConfig(model=str(ROOT / "seed_lm/model"), device="cpu"))
    check_base(LMConfig(model="seed_lm/model"), base)
    state_space = LanguageModel(model=tiny_model("mamba"), tokenizer=base.tokenizer, fingerprint="")
    with pytest.raises(ModelUnusable, match="MambaForCausalLM"):
        check_base(LMConfig(model="m"), state_space)
    check_base(LMConfig(model="m", probe=False), state_space)


def test_the_documented_tables_are_those_that_are_tried() -> None:
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    agreeing, refused = text.split("## Refused")
    rows = [re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE) for part in (agreeing, refused)]
    assert rows == [sorted(FAMILIES), sorted(REFUSED)]
