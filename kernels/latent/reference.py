"""A latent cache (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1) in plain torch: its two equal forms, and which is cheaper.

A token has one latent c (R) and one rotated key part r (P) for all heads; head h has the key [W_uk c, r] (n + P channels) and
the value W_uv c (Dv). Shapes: q (B, H, T, n + P), keys (B, 1, N, R + P) as [c, r], w_k (H, n, R), w_v (H, Dv, R).
"""

from __future__ import annotations

import torch
from torch import Tensor

EXPANDED_BYTES = 256 << 20  # keys and values that are expanded at a time; heads go one after another beyond that


def head_rows(weight: Tensor, heads: int, start: int, stride: int, width: int) -> Tensor:
    """Rows [start + h * stride, + width) of weight (N, R) for every head h: (heads, width, R), a view."""
    rows = weight[start : start + (heads - 1) * stride + width]
    return rows.unfold(0, width, stride).transpose(1, 2)


def absorb(q: Tensor, w_k: Tensor) -> Tensor:
    """Queries against [c, r] instead of the head's own keys, q . [W c, r] = [W^T q, q] . [c, r]: (B, H, T, R + P)."""
    n = w_k.shape[1]
    return torch.cat([torch.einsum("bhtn,hnr->bhtr", q[..., :n], w_k), q[..., n:]], dim=-1)


def project(out: Tensor, w_v: Tensor) -> Tensor:
    """What attention found of the latents (B, H, T, R) as the heads' own values: (B, H, T, Dv)."""
    return torch.einsum("bhtr,hvr->bhtv", out, w_v)


def expand(keys: Tensor, w_k: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor]:
    """The heads' own keys (B, H, N, n + P) and values (B, H, N, Dv) of keys (B, 1, N, R + P)."""
    latent, rotary = keys[:, 0, :, : w_k.shape[2]], keys[..., w_k.shape[2] :]
    nope = torch.einsum("bcr,hnr->bhcn", latent, w_k)
    own = torch.cat([nope, rotary.expand(-1, w_k.shape[0], -1, -1)], dim=-1)
    return own, torch.einsum("bcr,hvr->bhcv", latent, w_v).contiguous()


def expanding_is_cheaper(tokens: int, cached: int, n: int, dv: int, rank: int, rotary: int) -> bool:
    """Whether `tokens` new tokens on `cached` slots cost fewer multiplications with keys and values expanded first.

    Of each head, in multiplications:
      absorbed: every pair of a query and a key costs (R + P) + R; every query R (n + Dv) to absorb W_uk and to apply W_uv.
      expanded: every pair costs (n + P) + Dv; every key, cached or new, R (n + Dv) to expand.
    With DeepSeek's 512 + 64 and 128, 128 a pair costs 1088 or 320 and a key 131072 to expand, so that expanding is worth it
    from 171 new tokens on at the latest, however many slots there are, and at once where nothing is cached. A single token
    never expands (passes/lower/decode.py counts on it).
    """
    if tokens == 1:
        return False
    pairs = tokens * cached + tokens * (tokens + 1) // 2
    each = rank * (n + dv)
    absorbed = pairs * (2 * rank + rotary) + tokens * each
    return pairs * (n + rotary + dv) + (cached + tokens) * each < absorbed


def heads_at_once(heads: int, batch: int, slots: int, channels: int, itemsize: int) -> int:
    """How many heads' keys and values (`channels` a slot) fit into EXPANDED_BYTES; at least one."""
    return max(1, min(heads, EXPANDED_BYTES // max(1, batch * slots * channels * itemsize)))
