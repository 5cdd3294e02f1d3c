"""The model and the prompts of the comparison with kvpress, the same in both environments.

Weights are uniform numbers of torch's CPU generator, drawn in the order of the parameters' names: no transcendental
function is involved, so they are the same bits whatever the versions of transformers and the processor.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 128
LENGTHS = (24, 32, 41, 48, 60)  # of the prompts
CONTINUATION = 6  # tokens that follow each prompt
SHARPEN = 1.7  # of queries and keys: with plain random weights attention prefers no token, which hides mistakes

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_llama(attention: str = "sdpa") -> nn.Module:
    """A LlamaForCausalLM of this transformers, fp32. attention: its attention implementation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation=attention)).float().eval()
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)  # norms
                continue
            deviation = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            if "q_proj" in name or "k_proj" in name:
                deviation *= SHARPEN
            width = torch.tensor(deviation * 12**0.5, dtype=torch.float32)
            parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5) * width)
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all names and weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def prompt(length: int, seed: int) -> Tensor:
    """(1, length + CONTINUATION) token ids, none twice: the keys of equal tokens in layer 0 have equal norms, a tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(VOCAB, generator=generator)[None, : length + CONTINUATION]
