"""An untrained causal LM, for training one from nothing."""

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def fresh_llama(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
    max_positions: int,
    end_token: int,
    seed: int,
) -> LlamaForCausalLM:
    """A float32 Llama with tied embeddings whose weights are drawn from `seed` alone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp_width,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=end_token,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end_token, eos_token_id=end_token, pad_token_id=end_token
    )
    return model
