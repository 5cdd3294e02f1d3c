"""What a value can do to a layer's output, in plain torch (CriticalKV, arXiv 2502.03805)."""

from __future__ import annotations

import torch
from torch import Tensor


def projected_norm(v: Tensor, weight: Tensor) -> Tensor:
    """||W_h v||_1, averaged over the query heads h of a group: (B, Hkv, T) fp32.

    v: (B, Hkv, T, Dv); weight: (channels out, H * Dv), whose h-th block of columns is W_h. One query head at a time: the
    projected values of all heads would be H times as large as the layer's output.
    """
    kv_heads, channels = v.shape[1], v.shape[3]
    heads = weight.shape[1] // channels
    v = v.to(weight.dtype)
    found = []
    for kv_head in range(kv_heads):
        group = range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
        norms = [
            (v[:, kv_head] @ weight[:, h * channels : (h + 1) * channels].t()).abs().sum(-1, dtype=torch.float32)
            for h in group
        ]
        found.append(torch.stack(norms).mean(0))
    return torch.stack(found, 1)


__all__ = ["projected_norm"]
