"""Tiny configurations of every model type that `AutoModelForCausalLM` knows, made from the types' own defaults.

A size is known by its name: `SIZES` says what each becomes wherever a configuration has it, nested configurations
included; lists with one entry per layer are cut to the layers that are left, which show every kind of layer that the
default has. What that can't know about one type is in `SPECIAL`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOCAB = 97
WINDOW = 8

WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "input_embedding_size",
                     "output_embedding_size", "emb_dim", "attention_hidden_size", "embedding_dim", "lru_width"],
                    WIDTH),
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
    "query_pre_attn_scalar": 16, "rotary_dim": 8, "floor_scale": 8, "d_rel": 8, "rel_extent": 16,
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
COMPUTED = {"layers_block_type": ("attn_layer_period", "block_types")}  # made of these, and can't be given beside them
LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}
FLAGS = {"is_decoder": True}
REPLACE = "nothing of the default"

_DENSE_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_LAYERED_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
# One layer of a kind whose loops are long: each takes half a minute to trace.
_TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
               "mlp_layer_types": ["dense", "sparse"]}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _TWO_LAYERS,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_config": {"hidden_size_global": 64},
            "decoder_config": {"hidden_size_global": 64}, "global_config": {"encoder_cross_output_size": 128}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": _LAYERED_ROPE,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 96}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dory": {
        REPLACE: True,
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": WINDOW,
        "n_input_layers": 1, "n_output_layers": 1,
    },
    "dots1": {**_DENSE_EXPERTS, "first_k_dense_replace": 1, "max_window_layers": 1},
    "dots3_note": {"vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
                   "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64}},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
                        "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 16, "swa_qk_rope_head_dim": 8,
                        "swa_v_head_dim": 16, "swa_head_dim": 24, "head_dim": 24, "n_group": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 5, "num_kv_shared_layers": 2, "intermediate_size": [96] * 5,
        "activation_sparsity_pattern": [0.0] * 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": None, "L_cycles": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": _TWO_LAYERS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    # Its queries grow at every multiple of the trained length.
    "ministral3": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
                                       "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
                                       "llama_4_scaling_beta": 0.1}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 4, "ngram_vocab_size_base": 50, "split_ngram_parts": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "head_dim": 16},
    "reformer": {"axial_pos_shape": [8, 32], "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 0, "attention_hidden_size": 128,
              "attention_head_dim": 32, "n_mamba_heads": 2},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# What such models need besides the ids of a text, where the error that they raise does not say it.
NOT_A_TEXT = {
    "musicgen": "it makes audio: each token is a row of codes, after a text that another model encodes",
    "musicgen_melody": "it makes audio: each token is a row of codes, after a text that another model encodes",
    "gemma4_assistant": "it drafts for another model, and reads that model's keys and values",
    "gemma4_unified_assistant": "it drafts for another model, and reads that model's keys and values",
}

# Rows of their own for what no type has by default: name -> (model type, changes).
Variants = dict[str, tuple[str, dict[str, Any]]]

_SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # RoPE type -> its parameters, and other changes
    "linear": ({"factor": 2.0}, {}),
    # From max_position_embeddings on, so a text of measure.LENGTH tokens must be longer.
    "dynamic": ({"factor": 2.0}, {"max_position_embeddings": 32}),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 64}, {}),
    "yarn, not truncated": ({"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False,
                             "attention_factor": 1.25}, {}),
    "longrope": (
        {
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0 + 0.01 * i for i in range(8)],
            "long_factor": [1.5 + 0.05 * i for i in range(8)],
        },
        {},
    ),
    "longrope, short": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.5 + 0.05 * i for i in range(8)],
        },
        {},
    ),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {},
    ),
    "proportional": ({"partial_rotary_factor": 0.5, "factor": 2.0}, {}),
}  # fmt: skip
ROPES: Variants = {
    f"llama, {kind}": (
        "llama",
        {"rope_parameters": {"rope_type": kind.split(",")[0], "rope_theta": 10000.0, **more}, **changes},
    )
    for kind, (more, changes) in _SCALED.items()
}
ROPES |= {
    "deepseek_v3, yarn": (
        "deepseek_v3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0,
                             "original_max_position_embeddings": 64}},
    ),
}  # fmt: skip
# Text through models of images and text. Their sections get the same positions then, which is the plain rotation.
_NO_IMAGES = {"image_token_id": 0, "video_token_id": 0, "vision_start_token_id": 1, "vision_end_token_id": 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
SECTIONED: Variants = {
    "qwen2_5_vl, text": ("qwen2_5_vl", {**_NO_IMAGES, "text_config": {"rope_parameters": _SECTIONS}}),
    "qwen3_vl, text": (
        "qwen3_vl",
        {**_NO_IMAGES, "text_config": {"rope_parameters": {**_SECTIONS, "mrope_interleaved": True}}},
    ),
}
# The table of RoPE types: what a row shows -> the architecture or variant that has it.
ROPE_ROWS = {
    "default": "llama",
    "default, a part of the dims": "gpt_neox",
    "default, interleaved pairs": "cohere",
    "default, interleaved pairs and a part of the dims": "glm",
    "default, complex numbers": "llama4_text",
    "default, k rotated in part and shared by all heads (MLA)": "deepseek_v3",
    "default, another base for windows": "gemma3_text",
    "default, in some layers only": "smollm3",
    "linear": "llama, linear",
    "dynamic (NTK), beyond the trained length": "llama, dynamic",
    "yarn": "llama, yarn",
    "yarn, not truncated, own attention factor": "llama, yarn, not truncated",
    "yarn, mscale": "deepseek_v3, yarn",
    "longrope, long factors": "llama, longrope",
    "longrope, short factors": "llama, longrope, short",
    "llama3": "llama, llama3",
    "proportional": "llama, proportional",
    "proportional, in full layers only": "gemma4_text",
    "mrope, sections, text alone": "qwen2_5_vl, text",
    "mrope, interleaved sections, text alone": "qwen3_vl, text",
}

# Mixtures of experts, loaded with each implementation of transformers that does not need a package of its own.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
EXPERTS: Variants = {
    f"{name}, {experts}": (name, {}) for name in ("mixtral", "gpt_oss", "deepseek_v3") for experts in IMPLEMENTATIONS
}

OTHERS: Variants = {
    "falcon, rotary": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, ALiBi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {"multi_query": False}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
                                  "layer_types": None}),
    "gemma4_text, experts and shared keys": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
         "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma4_text, values are keys": ("gemma4_text", {"attention_k_eq_v": True}),
}  # fmt: skip
VARIANTS: Variants = ROPES | SECTIONED | EXPERTS | OTHERS


def model_types() -> list[str]:
    """Every model type with a causal language model in the installed transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Importing kvrewrite adds its own to the second.
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING_NAMES))


def order(name: str) -> tuple[bool, str]:
    """Sorts names so that models with recurrent layers, which take longest to trace, come last."""
    from transformers import CONFIG_MAPPING

    def fields(config: Any) -> Iterator[str]:
        yield from (name for name, value in vars(config).items() if not callable(value))
        for nested in getattr(config, "sub_configs", {}).values():
            yield from fields(nested)

    defaults = CONFIG_MAPPING[VARIANTS.get(name, (name, {}))[0]]
    marks = ("mamba", "conv", "linear_attention", "linear_key", "lru", "recurrent", "xlstm", "rwkv")
    return any(mark in field for field in fields(defaults) for mark in marks), name


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
        elif any(source in default for source in COMPUTED.get(name, ())):
            continue
        elif name in FLAGS:
            out[name] = FLAGS[name]
        elif name.endswith(("_token_id", "_token_index")):
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
            if (SIZES[name] == LAYERS and name.endswith("layers")) or name == "n_layer":
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
