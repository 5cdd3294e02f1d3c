"""Trained heads for the comparison with kvpress, the same in both environments: uniform numbers, as in tiny_llama.py."""

from __future__ import annotations

import torch
from torch import Tensor

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 3, 64, 8, 2, 16  # of tiny_llama
WIDTH, RANK, SINKS = 20, 6, 5
THRESHOLD, WINDOW = -0.6, 7  # KVzap's
FAST = {"n_sink": 2, "window_ratio": 0.1}
DUO_SINK, DUO_RECENT = 3, 8


def _uniform(generator: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    """Mean 0; size: the standard deviation."""
    return (torch.rand(shape, generator=generator) - 0.5) * torch.tensor(size * 12**0.5, dtype=torch.float32)


def kvzap(kind: str) -> dict[str, Tensor]:
    """The state_dict of a KVzapModel, "mlp" or "linear"."""
    generator, found = torch.Generator().manual_seed(31), {}
    for i in range(LAYERS):
        if kind == "linear":
            found[f"layers.{i}.weight"] = _uniform(generator, KV_HEADS, HIDDEN, size=0.2)
            found[f"layers.{i}.bias"] = _uniform(generator, KV_HEADS, size=0.2)
            continue
        found[f"layers.{i}.0.weight"] = _uniform(generator, WIDTH, HIDDEN, size=0.2)
        found[f"layers.{i}.0.bias"] = _uniform(generator, WIDTH, size=0.2)
        found[f"layers.{i}.2.weight"] = _uniform(generator, KV_HEADS, WIDTH, size=0.5)
        found[f"layers.{i}.2.bias"] = _uniform(generator, KV_HEADS, size=0.2)
    return found


def fast_kvzip() -> list[dict[str, Tensor]]:
    """The state_dict of each FastKVzipGate."""
    generator = torch.Generator().manual_seed(32)
    return [
        {
            "q_proj.weight": _uniform(generator, HEADS * RANK, HIDDEN),
            "q_proj.bias": _uniform(generator, HEADS * RANK),
            "k_proj.weight": _uniform(generator, KV_HEADS * RANK, HIDDEN),
            "q_norm.weight": 1 + _uniform(generator, RANK, size=0.3),
            "k_norm.weight": 1 + _uniform(generator, RANK, size=0.3),
            "k_base": _uniform(generator, KV_HEADS, 1, SINKS, RANK),
            "b": _uniform(generator, KV_HEADS, 1, HEADS // KV_HEADS),
        }
        for _ in range(LAYERS)
    ]


def qfilters() -> Tensor:
    """Filters as QFilters has them, (layers, kv heads, head dim)."""
    return _uniform(torch.Generator().manual_seed(33), LAYERS, KV_HEADS, HEAD_DIM)


ALPHA = [[0.61, 0.02], [1.3, 0.11], [0.25, 0.97]]  # DuoAttention's pattern
