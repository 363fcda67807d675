"""Tiny random-weight language models of several architectures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB_SIZE = 31


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


def save_model(model: PreTrainedModel, folder: Path, *, words: int = VOCAB_SIZE - 1) -> str:
    """Write a model and a tokenizer of so many words into a folder; its path."""
    model.save_pretrained(folder)
    vocabulary = WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary)).save_pretrained(folder)
    return str(folder)


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
