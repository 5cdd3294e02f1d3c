"""LagKV's scores in plain torch (arXiv 2504.04704, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.scores.reference import ranks


def lag_scores(k: Tensor, v: Tensor, valid: Tensor, sinks: int, lag: int, across: bool) -> Tensor:
    """How keys and values stand out from the next block of `lag` tokens: (B, Hkv, T) fp32.

    k: (B, Hkv, T, D); v: (B, Hkv, T, Dv); valid: (B,) real tokens of a row. Blocks begin after the
    first `sinks` tokens. Tokens whose next block is whole have a number below 1: their rank in
    their block over `lag`, or with `across` the mean of two softmaxes over it. Others have 1 +
    their index.
    """
    b, hkv, t, _ = k.shape
    index = torch.arange(t, device=k.device)
    others = (1.0 + index).expand(b, hkv, t)
    blocks = max(0, (t - sinks) // lag - 1)  # at most so many have a whole block after them
    if not blocks:
        return others.clone()
    judged = _stand_out(k, sinks, lag, blocks) + _stand_out(v, sinks, lag, blocks)
    if across:
        scores = judged / 2
    else:
        among = torch.ones_like(judged, dtype=torch.bool)
        scores = (lag - 1 - ranks(judged, among)).float() / lag
    end = sinks + blocks * lag
    scores = torch.cat([others[..., :sinks], scores.flatten(2), others[..., end:]], dim=-1)
    followed = (index[None] - sinks) // lag + 2 <= (valid[:, None] - sinks) // lag  # (B, T)
    return torch.where((followed & (index >= sinks))[:, None], scores, others)


def _stand_out(x: Tensor, sinks: int, lag: int, blocks: int) -> Tensor:
    """softmax over a block of each token's deviation among channels, measured by the next block:
    (B, Hkv, blocks, lag)."""
    cut = x[:, :, sinks : sinks + (blocks + 1) * lag].unflatten(2, (blocks + 1, lag)).float()
    low, high = cut[:, :, 1:].amin(3, keepdim=True), cut[:, :, 1:].amax(3, keepdim=True)
    width = high - low
    measured = torch.where(width > 0, (cut[:, :, :-1] - low) / width, 0.0)
    return torch.softmax(measured.std(-1), dim=-1)
