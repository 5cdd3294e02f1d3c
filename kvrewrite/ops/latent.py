"""The operator that reads a latent cache (MLA).

Such a cache has one kv head, whose key is a token's latent and the rotated key part that all heads share, [c, r] (R + P
channels). The value is the latent: the first R channels of the key, so that `v_pages` have a width of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import At, Dense, Logits, Pages, Tokens
from kvrewrite.kernels.latent import reference
from kvrewrite.ops.attention import ALL_VISIBLE, cached_attention, fake_attended
from kvrewrite.ops.groups import define

latent_attention_op = define(
    "latent_attention",
    "Tensor q",
    "Tensor k",
    "Tensor up_k",
    "Tensor up_v",
    Pages,
    At,
    ALL_VISIBLE,
    "SymInt[] rows",
    returns="(Tensor, Tensor)",
)


@latent_attention_op
def latent_attention(
    q: Tensor, k: Tensor, up_k: Tensor, up_v: Tensor, cache: Pages, at: At, logits: Logits, rows: list[int]
) -> tuple[Tensor, Tensor]:
    """`cached_attention` of all heads on a latent cache: [live slots] + [the new tokens, causal].

    q: (B, H, T, n + P), head h's own queries; k: (B, 1, T, R + P), the new tokens' latents and shared keys. up_k, up_v:
    (N, R) weights that project a latent to keys (n) and values (Dv); rows: [H, R, start, stride, n, start, stride, Dv],
    where head h has rows [start + h * stride, + n or Dv) of up_k and of up_v. k_pages (pages, PAGE, R + P), v_pages
    (pages, PAGE, 0), the rest as in `cached_attention`. Returns out (B, H, T, Dv), in memory (B, T, H, Dv), and the
    natural log-sum-exp (B, H, T) fp32.

    It runs absorbed (queries against the latents, then W_uv) or expands keys and values of the cache first, whichever
    takes fewer multiplications; a single token is always absorbed.
    """
    heads, rank, n, dv = rows[0], rows[1], rows[4], rows[7]
    w_k, w_v = reference.head_rows(up_k, heads, *rows[2:5]), reference.head_rows(up_v, heads, *rows[5:])
    cached = cache.table.shape[2] * cache.k_pages.shape[1]
    if not reference.expanding_is_cheaper(q.shape[2], cached, n, dv, rank, k.shape[3] - rank):
        tokens = Tokens(reference.absorb(q, w_k), k, k[..., :rank])
        out, lse = cached_attention(tokens, Dense(), cache, at, logits)
        return _tokens_first(reference.project(out, w_v)), lse
    slots = pages.read(cache.k_pages, cache.table)
    live = torch.arange(cached, device=q.device) < cache.lens[..., None]
    slots = torch.where(live[..., None], slots, 0).to(k.dtype)  # a dead slot may hold anything
    step = reference.heads_at_once(heads, q.shape[0], cached + q.shape[2], q.shape[3] + dv, q.element_size())
    outs, lses = [], []
    for begin in range(0, heads, step):
        part = slice(begin, min(heads, begin + step))
        own, values = reference.expand(k, w_k[part], w_v[part])
        dense = Dense(*reference.expand(slots, w_k[part], w_v[part]))
        each = own.shape[1]
        expanded = cache._replace(
            table=cache.table.expand(-1, each, -1).contiguous(), lens=cache.lens.expand(-1, each).contiguous()
        )
        sinks, alibi = (None if x is None else x[part] for x in (logits.sinks, logits.alibi))
        tokens = Tokens(q[:, part], own, values)
        out, lse = cached_attention(tokens, dense, expanded, at, logits._replace(sinks=sinks, alibi=alibi))
        outs.append(out)
        lses.append(lse)
    return _tokens_first(torch.cat(outs, dim=1)), torch.cat(lses, dim=1)


def _tokens_first(out: Tensor) -> Tensor:
    """(B, H, T, Dv), in memory (B, T, H, Dv)."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@latent_attention_op.fake
def _(
    q: Tensor, k: Tensor, up_k: Tensor, up_v: Tensor, cache: Pages, at: At, logits: Logits, rows: list[int]
) -> tuple[Tensor, Tensor]:
    return fake_attended(q, rows[7])
