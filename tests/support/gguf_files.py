"""Writes a tiny Llama as a GGUF file, as llama.cpp's converter would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, file: Path, kind: str = "F32", leave_out: str = "", **more: Any) -> Path:
    """Writes the Llama of a checkpoint directory to `file`.

    kind: the type of its matrices (gguf's name). leave_out: a tensor to leave out. more: writer calls, such as
    add_sliding_window=64; add_tensor=(name, array) adds a tensor.
    """
    import gguf
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, checkpoint)
    for name, value in more.items():
        getattr(writer, name)(*value) if isinstance(value, tuple) else getattr(writer, name)(value)
    for name, weight in model.state_dict().items():
        short, array = _renamed(name), _permuted(name, weight, config).numpy()
        if short == leave_out:
            continue
        if kind == "F32" or array.ndim == 1:
            writer.add_tensor(short, array)
        else:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(short, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _renamed(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{suffix}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[rest]}.{suffix}"


def _permuted(name: str, weight: Tensor, config: Any) -> Tensor:
    """llama.cpp has the two halves of a rotated pair side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _add_tokenizer(writer: Any, checkpoint: Path) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<pad>", "<eos>") else 1 for word in words])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
