"""A tiny checkpoint directory with a real tokenizer, for tests of what works on directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = "The quick brown fox jumps over the lazy dog. She sells sea shells by the sea shore. " * 4
OPTIONS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def make_checkpoint(directory: Path, **changes: Any) -> Path:
    """A sharded Llama checkpoint with a tokenizer that was trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), pad_token_id=0, eos_token_id=1, bos_token_id=None, **{**OPTIONS, **changes}
    )
    LlamaForCausalLM(config).eval().save_pretrained(directory, max_shard_size="40KB")
    fast.save_pretrained(directory)
    return directory
