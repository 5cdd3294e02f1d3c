"""Attention of a few new tokens on a long paged cache, such as drafted tokens that are checked: the cache is read once,
from its pages, by the kernel of single tokens.

The queries of all new tokens that share a kv head go through that kernel as one group: they all see the cache and the
first new token. What they see of the other new tokens is small, and joins by its log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.attention.decode import decode_attention, logit
from kvrewrite.kernels.groups import At, Dense, Logits, Pages, Tokens
from kvrewrite.kernels.launch import begin, options
from kvrewrite.kernels.limits import FEW_TOKENS, MOST_CHANNELS

FEWEST_PAGES = 64  # that tables have room for: shorter caches are gathered, which costs little
MOST_TOKENS = FEW_TOKENS
MOST_QUERIES = 64  # of a kv head: query heads times tokens
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


def suits(tokens: Tokens, cache: Pages, logits: Logits) -> bool:
    """Whether new tokens are few (and more than one), see all that is cached, and that may be long; by shapes only."""
    long = cache.table.shape[2] >= FEWEST_PAGES
    (_, h, t, _), hkv = tokens.q.shape, tokens.k.shape[1]
    plain = logits.hidden is None and logits.sinks is None and not logits.placed
    narrow = max(tokens.q.shape[3], tokens.v.shape[3]) <= MOST_CHANNELS
    return long and plain and narrow and 1 < t <= MOST_TOKENS and h // hkv * t <= MOST_QUERIES


@triton.jit(do_not_specialize=["q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t"])
def _join_kernel(
    q, k, v, seen, seen_lse, valid, out, lse, scale, softcap, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, SOFTCAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query: what it has seen so far, and the new tokens from the second on up to its own."""
    row = tl.program_id(0)
    t = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = row % H
    begin(PDL)
    j = tl.arange(0, TP)
    there = (j > 0) & (j <= t) & (j < tl.load(valid + b))
    d, e = tl.arange(0, DP), tl.arange(0, DVP)
    query = tl.load(q + b * q_b + h * q_h + t * q_t + d, mask=d < D, other=0.0).to(tl.float32)
    of_k, of_v = there[:, None] & (d < D)[None, :], there[:, None] & (e < DV)[None, :]
    keys = tl.load(k + b * k_b + (h // G) * k_h + j[:, None] * k_t + d[None, :], mask=of_k, other=0.0).to(tl.float32)
    values = tl.load(v + b * v_b + (h // G) * v_h + j[:, None] * v_t + e[None, :], mask=of_v, other=0.0).to(tl.float32)
    x = logit(tl.sum(query[None, :] * keys, 1), softcap, scale, SOFTCAP)
    x = tl.where(there, x, float("-inf"))
    at = row.to(tl.int64) * T + t
    before = tl.load(seen_lse + at) * _LOG2E
    top = tl.maximum(before, tl.max(x, 0))
    base = tl.where(top == float("-inf"), 0.0, top)  # rows without a token
    share, weight = tl.exp2(before - base), tl.exp2(x - base)
    total = share + tl.sum(weight, 0)
    norm = tl.where(total > 0, total, 1.0)
    found = tl.load(seen + at * DV + e, mask=e < DV, other=0.0).to(tl.float32)
    found = (found * share + tl.sum(weight[:, None] * values, 0)) / norm
    tl.store(out + ((b * T + t) * H + h) * DV + e, found.to(out.dtype.element_ty), mask=e < DV)
    tl.store(lse + at, tl.where(total > 0, (base + tl.log2(norm)) * _LN2, float("-inf")))


def few_tokens(tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits) -> tuple[Tensor, Tensor]:
    """`kvrewrite::cached_attention` where `suits`: out (B, H, T, Dv) in q's dtype, in memory (B, T, H, Dv), and the
    log-sum-exp (B, H, T) fp32. Queries after the end of a row give numbers that mean nothing."""
    (q, k, v), (b, h, t, d), dv = tokens, tokens.q.shape, tokens.v.shape[3]
    together = q.reshape(b, h * t, 1, d)  # the heads of a group lie together, and so do their tokens
    first = Tokens(together, k[:, :, :1], v[:, :, :1])
    seen, seen_lse, _ = decode_attention(first, dense, cache, At(at.positions[:, :1], at.valid), logits)
    out = torch.empty(b, t, h, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    _join_kernel[(b * h, t)](
        q, k, v, seen, seen_lse, at.valid, out, lse, logits.scale, logits.softcap, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], H=h, G=h // k.shape[1], T=t, TP=triton.next_power_of_2(t), D=d, DP=triton.next_power_of_2(d),
        DV=dv, DVP=triton.next_power_of_2(dv), SOFTCAP=logits.softcap != 0, num_warps=2, **options(q.device),
    )  # fmt: skip
    return out.transpose(1, 2), lse
