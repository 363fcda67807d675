"""Fixtures shared by the tests: tiny random-weight language models of several architectures."""

import os
from collections.abc import Callable, Generator

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCAB_SIZE = 31

# How fast examples come says how busy the machine is, and nothing of the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def tiny_config(architecture: str) -> PretrainedConfig:
    """Configuration of a two-layer model over VOCAB_SIZE tokens."""
    match architecture:
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256
            )
        case "gptj":
            return GPTJConfig(
                vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4
            )
        case "gpt_neox":
            return GPTNeoXConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=256,
            )
        case "llama" | "qwen2":
            kind = LlamaConfig if architecture == "llama" else Qwen2Config
            return kind(
                vocab_size=VOCAB_SIZE,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                max_position_embeddings=256,
            )
    raise ValueError(f"no tiny model of architecture {architecture!r}")


ARCHITECTURES = ("gpt2", "llama", "qwen2", "gptj", "gpt_neox")


@pytest.fixture
def tiny_lm() -> Callable[[str], PreTrainedModel]:
    """A function from architecture name to a model with fixed random weights, dropout off."""

    def build(architecture: str) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture))
        # Default initialisation is nearly uniform over tokens; sharper weights make errors visible.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.3)
        return model.eval()

    return build


# Set where no test may be skipped for want of a program or a permission, as on CI.
ALL = "AMORTIZE_TEST_ALL"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and ALL in os.environ and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"{ALL} is set, but the test was skipped: {report.longrepr}"
    return report


# Setup included, which of many is the start of Ray.
SLOW_TIMEOUT_S = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pace", choices=("fast", "slow", "beside"), help="only tests of this pace")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give slow tests the time that they need, and keep tests of one pace where asked to."""
    for item in items:
        if pace_of(item) != "fast" and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
    if (pace := config.getoption("pace")) is None:
        return
    chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        chosen[pace_of(item) == pace].append(item)
    items[:] = chosen[True]
    config.hook.pytest_deselected(items=chosen[False])


def pace_of(item: pytest.Item) -> str:
    """Of the slow tests, those that leave room for another run beside it."""
    if item.get_closest_marker("slow") is None:
        return "fast"
    return "slow" if item.get_closest_marker("beside") is None else "beside"
