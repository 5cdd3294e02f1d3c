"""Operators that lowering puts in the place of several others (passes/lower). Shapes and groups as in kernels/groups.py."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels import limits, pages
from kvrewrite.kernels.groups import (
    At,
    Cache,
    Dense,
    Eviction,
    KeyPages,
    Logits,
    NewTokens,
    Pages,
    Rows,
    TokenOptions,
    Tokens,
    Watch,
)
from kvrewrite.ops.attention import ALL_VISIBLE, cached_attention, fake_attended, observe, why_not_cached
from kvrewrite.ops.dispatch import fused
from kvrewrite.ops.groups import Fields, define
from kvrewrite.ops.rotary import rope
from kvrewrite.ops.update import EVICTION, POOLS, cache_update

decode_attention_op = define(
    "decode_attention",
    Tokens,
    Dense,
    Pages,
    At,
    ALL_VISIBLE,
    Fields(TokenOptions, "mass"),
    Fields(TokenOptions, "cos sin early following key_cos key_sin", optional=True),
    returns="(Tensor, Tensor, Tensor)",
)


@decode_attention_op
def decode_attention(
    tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits, options: TokenOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` of one new token per row (T = 1), with the attention mass of every slot from the same pass.

    Returns out (B, H, 1, Dv), the log-sum-exp (B, H, 1) fp32, and with `mass` what `observe` gives for a weight of 1:
    (B, Hkv, C + 1) fp32; without it that is empty. cos, sin: (B, 1, D): q and k come unrotated, and are rotated by `rope` first.
    early: what is launched just before writes none of pools, table, lens and valid; kernels then read them while it still runs.

    following (B,) int64, key_cos and key_sin (N, D): cached keys come unrotated. A slot of rank r from the newest (0) has the
    second position `positions - 1 - r` in pos_pages, as `token_update` keeps it, and its key is rotated by following - 1 - r; y =
    cos * x + sin * x[partner] of channels whose partners are half a head away.
    """
    q, k, v = tokens
    dims = (q.shape[3], v.shape[3], q.shape[1] // k.shape[1])
    why = limits.why_not_latent(cache.v_pages.shape[-1]) or limits.why_not(*dims, 1, False)
    if fused("decode_attention", q, why):
        from kvrewrite.kernels.attention.decode import decode_attention as kernel

        if options.key_cos is not None and options.key_sin is not None:
            tables = options.key_cos.contiguous(), options.key_sin.contiguous()
            options = TokenOptions(*options[:5], *tables)
        out, lse, found = kernel(tokens, dense, cache, at, logits, options)
        return out, lse, lse.new_empty(0) if found is None else found
    mass, cos, sin, _, following, key_cos, key_sin = options
    tokens = Tokens(rope(q, cos, sin), rope(k, cos, sin), v)
    if following is not None:
        live = torch.arange(cache.table.shape[2] * cache.k_pages.shape[1], device=q.device) < cache.lens[..., None]
        back = at.positions[:, :, None] - pages.read(cache.pos_pages, cache.table)[..., 1]
        ranks = torch.where(live, (following[:, None, None] - back).clamp(min=0), 0)
        partner = torch.arange(q.shape[3], device=q.device).roll(q.shape[3] // 2)
        keys = pages.read(cache.k_pages, cache.table)
        dense = dense._replace(k_dense=torch.ops.kvrewrite.rotate(keys, key_cos, key_sin, ranks, partner))
    out, lse = cached_attention(tokens, dense, cache, at, logits)
    if not mass:
        return out, lse, lse.new_empty(0)
    watch = Watch(tokens.q, tokens.k, lse, torch.ones(q.shape[0], 1, device=q.device))
    keys_only = KeyPages(cache.k_pages, cache.pos_pages, cache.table, cache.lens)
    return out, lse, observe(watch, dense, keys_only, at, logits)


def fake_token(tokens: Tokens, table: Tensor, pool: Tensor, mass: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What attention of one token gives looks so."""
    q, b, h = tokens.q, tokens.q.shape[0], tokens.q.shape[1]
    width = (*table.shape[:2], table.shape[2] * pool.shape[1] + 1)
    found = q.new_empty(width if mass else (0,), dtype=torch.float32)
    return q.new_empty(b, h, 1, tokens.v.shape[3]), q.new_empty(b, h, 1, dtype=torch.float32), found


@decode_attention_op.fake
def _(
    tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits, options: TokenOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_token(tokens, cache.table, cache.k_pages, options.mass)


attend_and_update_op = define(
    "attend_and_update",
    Tokens,
    Dense,
    Fields(Logits, "attention_sinks=sinks alibi hidden scale softcap visible_window=window visible_chunk=chunk"),
    Fields(NewTokens, "new_k=k new_v=v new_scores slot_scores"),
    Rows,
    Cache,
    EVICTION,
    returns="(Tensor, Tensor)",
    writes=POOLS,
)


@attend_and_update_op
def attend_and_update(
    tokens: Tokens, dense: Dense, logits: Logits, new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction
) -> tuple[Tensor, Tensor]:
    """`cached_attention`, and then `cache_update` of heads that neither share budgets nor merge, and that needs nothing of the
    attention. On a GPU both run at the same time."""
    why = why_not_cached(tokens, dense, cache.pages, logits)
    if fused("attend_and_update", tokens.q, why):
        from kvrewrite.kernels import composed

        return composed.attend_and_update(tokens, dense, logits, new, rows, cache, eviction)
    result = cached_attention(tokens, dense, cache.pages, rows.at, logits)
    cache_update(new, rows, cache, eviction)
    return result


@attend_and_update_op.fake
def _(
    tokens: Tokens, dense: Dense, logits: Logits, new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction
) -> tuple[Tensor, Tensor]:
    return fake_attended(tokens.q, tokens.v.shape[3])
