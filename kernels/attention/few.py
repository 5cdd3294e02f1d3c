"""Attention of a few new tokens on a long paged cache, such as drafted tokens that are checked: the cache is read once,
from its pages, by the kernel of single tokens.

The queries of all new tokens that share a kv head go through that kernel as one group: they all see the cache and the
first new token. What they see of the other new tokens is small, and joins by its log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.attention.decode import decode_attention
from kvrewrite.kernels.groups import At, Dense, Logits, Pages, Tokens
from kvrewrite.kernels.limits import MOST_CHANNELS

FEWEST_PAGES = 64  # that tables have room for: shorter caches are gathered, which costs little
MOST_TOKENS = 8
MOST_QUERIES = 64  # of a kv head: query heads times tokens


def suits(tokens: Tokens, cache: Pages, logits: Logits) -> bool:
    """Whether new tokens are few (and more than one), see all that is cached, and that may be long; by shapes only."""
    long = cache.table.shape[2] >= FEWEST_PAGES
    (_, h, t, _), hkv = tokens.q.shape, tokens.k.shape[1]
    plain = logits.hidden is None and logits.sinks is None and not logits.placed
    narrow = max(tokens.q.shape[3], tokens.v.shape[3]) <= MOST_CHANNELS
    return long and plain and narrow and 1 < t <= MOST_TOKENS and h // hkv * t <= MOST_QUERIES


def few_tokens(tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits) -> tuple[Tensor, Tensor]:
    """`kvrewrite::cached_attention` where `suits`: out (B, H, T, Dv) in q's dtype, in memory (B, T, H, Dv), and the
    log-sum-exp (B, H, T) fp32. Queries after the end of a row give numbers that mean nothing."""
    (q, k, v), (b, h, t, d) = tokens, tokens.q.shape
    hkv, dv = k.shape[1], v.shape[3]
    together = q.reshape(b, h * t, 1, d)  # the heads of a group lie together, and so do their tokens
    first = Tokens(together, k[:, :, :1], v[:, :, :1])
    of_first = At(at.positions[:, :1], at.valid.clamp(max=1))
    out, lse, _ = decode_attention(first, dense, cache, of_first, logits)
    seen, lse = out.view(b, hkv, h // hkv, t, dv).float(), lse.view(b, hkv, h // hkv, t)
    x = q.reshape(b, hkv, h // hkv, t, d).float() @ k[:, :, None, 1:].float().transpose(-1, -2)
    x = x * logits.scale
    if logits.softcap:
        x = logits.softcap * torch.tanh(x / logits.softcap)
    place = torch.arange(t, device=q.device)
    visible = (place[1:] <= place[:, None]) & (place[1:] < at.valid[:, None, None])
    x = x.masked_fill(~visible[:, None, None], float("-inf"))
    total = torch.logaddexp(lse, x.logsumexp(-1))
    values = v[:, :, None, 1:].float().masked_fill(~(place[1:] < at.valid[:, None])[:, None, None, :, None], 0.0)
    base = total.masked_fill(total == float("-inf"), 0.0)[..., None]  # rows without a token
    found = seen * (lse[..., None] - base).exp() + (x - base).exp() @ values
    found = found.view(b, h, t, dv).transpose(1, 2).contiguous().to(q.dtype)
    return found.transpose(1, 2), total.view(b, h, t)
