"""A tiny random model of each family of causal LMs that tests try."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 61

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# In the words of Llama, and of GPT-2.
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_HEADS_OF_8 = _LLAMA | {"head_dim": 8}
_NO_GROUPS = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

# Family as the hub's config.json calls it (`model_type`) -> what makes it tiny.
FAMILIES: dict[str, dict[str, Any]] = {
    "biogpt": _NO_GROUPS,
    "codegen": _GPT2 | {"rotary_dim": 4, "n_positions": 96, "n_ctx": 96},
    "cohere": _LLAMA,
    "cohere2": _LLAMA | _WINDOWS,
    "ctrl": _GPT2 | {"dff": 48, "n_positions": 96},
    "deepseek_v2": _LLAMA
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    | {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    | {"n_group": 1, "topk_group": 1},
    "exaone4": _HEADS_OF_8 | _WINDOWS,
    "falcon": _NO_GROUPS | {"alibi": False, "new_decoder_architecture": False},
    "gemma": _HEADS_OF_8,
    "gemma2": _HEADS_OF_8 | _WINDOWS | {"query_pre_attn_scalar": 8},
    "gemma3": {
        "text_config": _HEADS_OF_8 | _WINDOWS | {"query_pre_attn_scalar": 8},
        "vision_config": _VISION | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "gemma3_text": _HEADS_OF_8 | _WINDOWS | {"query_pre_attn_scalar": 8},
    "glm": _HEADS_OF_8,
    "glm4": _HEADS_OF_8,
    "gpt2": _GPT2 | {"n_positions": 96},
    "gpt_bigcode": _GPT2 | {"n_positions": 96},
    "gpt_neox": _NO_GROUPS,
    "gpt_oss": _HEADS_OF_8 | _WINDOWS | _EXPERTS,
    "gptj": _GPT2 | {"rotary_dim": 4, "n_positions": 96},
    "granite": _LLAMA,
    "helium": _HEADS_OF_8,
    "llama": _LLAMA,
    "llama4_text": _HEADS_OF_8
    | _EXPERTS
    | {"attention_chunk_size": 12, "layer_types": ["chunked_attention", "full_attention"]}
    | {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
    "ministral": _HEADS_OF_8 | _WINDOWS,
    "mistral": _LLAMA | {"sliding_window": 12},
    "mixtral": _LLAMA | _EXPERTS | {"sliding_window": None},
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA | _WINDOWS,
    "opt": _NO_GROUPS | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": _NO_GROUPS,
    "phi": _LLAMA,
    "phi3": _LLAMA | {"sliding_window": 12},
    "qwen2": _LLAMA | _WINDOWS | {"use_sliding_window": True},
    "qwen2_moe": _LLAMA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3": _HEADS_OF_8,
    "qwen3_moe": _HEADS_OF_8
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "seed_oss": _HEADS_OF_8,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA | {"sliding_window": 12},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}
REFUSED: dict[str, dict[str, Any]] = {
    "bert": _NO_GROUPS | {"is_decoder": False},
    "bamba": _LLAMA | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon_alibi": _NO_GROUPS | {"alibi": True, "new_decoder_architecture": False},
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    | {"mamba_chunk_size": 8},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 12}
    | {"attention_types": [[["global", "local"], 1]], "intermediate_size": 48},
    "jamba": _LLAMA,
    "lfm2": _LLAMA | {"layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8}
    | {"n_groups": 1, "state_size": 8},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 96},
    "qwen3_5_text": _HEADS_OF_8 | _LINEAR,
    "qwen3_next": _HEADS_OF_8 | _LINEAR | {"num_experts": 4, "num_experts_per_tok": 2},
    "recurrent_gemma": _LLAMA,
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 96},
}


def tiny_model(family: str) -> PreTrainedModel:
    """A frozen model with random weights, sharp enough that an error shows."""
    sizes = FAMILIES.get(family) or REFUSED[family]
    if "text_config" in sizes:
        sizes = sizes | {"text_config": _COMMON | sizes["text_config"]}
    else:
        sizes = _COMMON | sizes
    config = AutoConfig.for_model(family.removesuffix("_alibi"), **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return model.eval().requires_grad_(False)
