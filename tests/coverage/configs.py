"""Tiny configurations of every model type that `AutoModelForCausalLM` knows, made from the types' own defaults.

A size is known by its name: `SIZES` says what each becomes wherever a configuration has it, nested configurations
included; lists with one entry a layer are cut to the layers that are left, which show every kind of layer that the
default has. What that can't know about one type is in `SPECIAL`.
"""

from __future__ import annotations

from typing import Any

VOCAB = 97
WINDOW = 8

WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "input_embedding_size",
                     "output_embedding_size", "emb_dim", "attention_hidden_size", "embedding_dim", "lru_width",
                     "linear_num_heads_width"], WIDTH),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dim_ff", "dff",
                     "intermediate_size_mlp", "dense_intermediate_size", "d_inner", "feed_forward_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"], 32),
    # layers
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers", "num_layers_per_stack", "num_blocks"], LAYERS),
    # heads
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
                     "swa_num_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"], KV_HEADS),
    **dict.fromkeys(["head_dim", "swa_head_dim", "kv_channels", "d_head", "dim_head", "attention_head_dim",
                     "attention_head_size"], HEAD_DIM),
    "query_pre_attn_scalar": 16, "rotary_dim": 8, "d_rel": 8, "rel_extent": 16,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "o_lora_rank": 16,
    "qk_head_dim": 24, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "o_groups": 2,
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "n_group", "num_expert_group"], 2),
    **dict.fromkeys(["topk_group", "first_k_dense_replace", "moe_layer_start_index", "n_shared_experts", "num_shared_experts",
                     "moe_num_shared_experts"], 1),
    # positions and masks
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "context_length",
                     "max_target_positions", "max_source_positions"], 256),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size", "attention_chunk_size", "keep_window_size",
                     "local_attention", "attention_window_size"], WINDOW),
    # vocabularies
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size",
                     "pronunciation_vocab_size", "shape_vocab_size"], VOCAB),
    "type_vocab_size": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2,
    # recurrent and convolutional layers
    **dict.fromkeys(["mamba_n_heads", "linear_num_value_heads", "linear_num_key_heads", "linear_num_heads", "n_mamba_heads",
                     "mamba_num_heads"], 4),
    **dict.fromkeys(["mamba_d_head", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_headdim",
                     "mamba_d_state", "ssm_state_size", "state_size", "mamba_head_dim"], 16),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "mamba_dt_rank", "time_step_rank"], 8),
    **dict.fromkeys(["n_groups", "mamba_n_groups", "mamba_ngroups"], 1),
}  # fmt: skip
# Grouping is kept where a type has it by default, and not made where it has none.
GROUPS = {"num_key_value_heads": "num_attention_heads", "num_kv_heads": "num_attention_heads",
          "swa_num_key_value_heads": "swa_num_attention_heads"}  # fmt: skip
LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}
FLAGS = {"is_decoder": True}
REPLACE = "nothing of the default"

SPECIAL: dict[str, dict[str, Any]] = {}

# Rows of their own for what no type has by default: name -> (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}


def model_types() -> list[str]:
    """Every model type with a causal language model in the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(name: str) -> Any:
    """The tiny configuration of a model type or variant."""
    from transformers import CONFIG_MAPPING

    model_type, changes = VARIANTS.get(name, (name, {}))
    cls = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    base = {} if REPLACE in special else shrunk(cls().to_dict())
    return cls(**merged(merged(base, {k: v for k, v in special.items() if k != REPLACE}), changes))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, nested dictionaries merged."""
    out = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict) and not name.startswith("rope")
        out[name] = merged(out[name], value) if both else value
    return out


def shrunk(default: dict[str, Any]) -> dict[str, Any]:
    """What to give to the class whose default configuration is `default`."""
    out: dict[str, Any] = {}
    layers, kept = _layers(default)
    for name, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            out[name] = shrunk(value) | {"model_type": value["model_type"]}
        elif name in FLAGS:
            out[name] = FLAGS[name]
        elif name.endswith("_token_id") or name.endswith("_token_index"):
            if isinstance(value, int) and value >= 0:
                out[name] = TOKENS.get(name, min(value, VOCAB - 1))
            elif isinstance(value, list):
                out[name] = TOKENS.get(name, 3)
        elif isinstance(value, list) and layers and len(value) == layers:
            out[name] = [value[i] for i in kept]
            if name not in LAYER_KINDS and name in SIZES:
                out[name] = [SIZES[name]] * len(kept)
        elif isinstance(value, list) and name in SIZES and value and isinstance(value[0], int):
            out[name] = [SIZES[name]] * len(value)
        elif value is None and name in ("head_dim", "num_key_value_heads"):
            out[name] = HEAD_DIM if name == "head_dim" else HEADS
        elif name == "head_dim" and value == default.get("qk_rope_head_dim"):
            out[name] = SIZES["qk_rope_head_dim"]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            out[name] = SIZES[name]
            if name in GROUPS and value == default.get(GROUPS[name]):
                out[name] = HEADS
            if SIZES[name] == LAYERS and name.endswith("layers") or name == "n_layer":
                out[name] = len(kept) if value == layers else LAYERS
    return out


def _layers(default: dict[str, Any]) -> tuple[int, list[int]]:
    """How many layers a default configuration has, and which of them show every kind; at least `LAYERS`."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    layers = next((default[n] for n in names if isinstance(default.get(n), int)), 0)
    kinds = [default[n] for n in LAYER_KINDS if isinstance(default.get(n), list) and len(default[n]) == layers]
    kept: list[int] = []
    seen: set[Any] = set()
    for i in range(layers):
        new = {(j, str(kind[i])) for j, kind in enumerate(kinds)} - seen
        if new:
            kept.append(i)
            seen |= new
    kept += [i for i in range(layers) if i not in kept][: max(0, LAYERS - len(kept))]
    return layers, sorted(kept)
