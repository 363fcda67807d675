"""Models, items and configurations for tests of the reward replica."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from reward.config import RewardConfig
from reward.request import ScoreItem
from tests.tiny_lm import VOCAB_SIZE, tiny_config

CONFIG = RewardConfig(token_budget=150, deadline_s=30.0)


def make_model(architecture: str) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def make_items(count: int, seed: int = 0) -> list[ScoreItem]:
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        length = int(rng.integers(0, 15))
        items.append(
            ScoreItem(
                context=rng.integers(0, VOCAB_SIZE, rng.integers(1, 12)).astype(np.int32),
                completion=rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
                stops=np.arange(length + 1, dtype=np.int32),
                answer=rng.integers(0, VOCAB_SIZE, rng.integers(1, 5)).astype(np.int32),
            )
        )
    return items


def assert_same(got: Sequence[NDArray], expected: Sequence[NDArray]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


def replace_config(**changes: float) -> RewardConfig:
    return RewardConfig.model_validate({**CONFIG.model_dump(), **changes})
