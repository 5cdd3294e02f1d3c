"""Tiny transformers decoders with random weights, one for every family that behaves differently in the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

# What differs from COMMON. A key is the model type, unless "model_type" says otherwise.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "phi3": {
        "hidden_size": 384,
        "pad_token_id": 0,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0 + 0.01 * i for i in range(48)],
            "long_factor": [1.5 + 0.05 * i for i in range(48)],
            "factor": 8.0,
        },
    },
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {"rotary_pct": 0.25},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
    },
    "gemma3n_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "intermediate_size": [96] * 5,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 5,
    },
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "falcon_rope": {"model_type": "falcon", "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


# The special tokens of some families' defaults are outside of this vocabulary.
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Families without transformers' attention interface, besides bloom and falcon: found in the traced graph.
WALKED: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        **TOKENS,
    },
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256, **TOKENS},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, **TOKENS},
}

# Models that no honest rewrite exists for, or none yet: they can't be captured or have masks that depend on the text.
REFUSED: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "doge": {"head_dim": 16, "keep_window_size": 8, **TOKENS},
    "deepseek_v32": {
        **FAMILIES["deepseek_v3"],
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
}
# For tests whose subject is not the layers, and which pay for each: torch.compile takes two seconds for a graph of two.
SHALLOW: dict[str, dict[str, Any]] = {
    f"shallow_{name}": {**FAMILIES[name], "model_type": name, "num_hidden_layers": 1} for name in ("llama", "mistral")
}
CONTENT_DEPENDENT = ("doge", "deepseek_v32")


def make(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of the family `name` in eval mode, with weights that depend on `seed` only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**COMMON, **{**WALKED, **REFUSED, **SHALLOW, **FAMILIES}.get(name, {}), **changes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(options.pop("model_type", name), **options)
    # sdpa has no softcap: some versions of transformers leave it out without a word, and then the original is not the model.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
