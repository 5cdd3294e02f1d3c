"""The operators of quantized caches. Shapes and groups as in kernels/groups.py; see kernels/quantized/reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.groups import (
    At,
    Codes,
    Dense,
    Eviction,
    Logits,
    NewTokens,
    Pages,
    QuantizedCache,
    QuantizedPages,
    Ragged,
    Rows,
    TokenOptions,
    Tokens,
)
from kvrewrite.kernels.quantized import reference
from kvrewrite.kernels.quantized.scheme import Scheme
from kvrewrite.kernels.quantized.tiles import why_not
from kvrewrite.ops.decode import decode_attention, fake_token
from kvrewrite.ops.dispatch import fused
from kvrewrite.ops.groups import Fields, define
from kvrewrite.ops.update import EVICTION


@torch.library.custom_op("kvrewrite::read_quantized", mutates_args=())
def read_quantized(
    codes: Tensor, params: Tensor, tail: Tensor, table: Tensor, qlens: Tensor, kind: str, group: int, values: bool
) -> Tensor:
    """The slots of every head in slot order, in full precision: (B, Hkv, C, D); what is not live may be anything.

    codes (pages, PAGE, width) uint8 and params, by page, hold slots [0, qlens) of each head, quantized as `kind` says, keys or
    values; tail (B, Hkv, R + group, D) holds the slots from qlens (B, Hkv) on. See kernels/quantized/reference.py.
    """
    return reference.Pools(codes, params, tail).read(table, qlens, Scheme(kind, group), values)


@read_quantized.register_fake
def _(codes, params, tail, table, qlens, kind, group, values):  # type: ignore[no-untyped-def]
    return tail.new_empty(*table.shape[:2], table.shape[2] * codes.shape[1], tail.shape[3])


cache_update_quantized_op = define(
    "cache_update_quantized",
    NewTokens,
    Rows,
    Fields(QuantizedCache, "k_cached v_cached"),
    Fields(Codes, "k_pages v_pages k_params v_params"),
    Fields(QuantizedCache, "score_pages pos_pages"),
    Fields(Codes, "k_tail v_tail"),
    Fields(QuantizedCache, "table lens qlens"),
    Scheme,
    EVICTION,
    Ragged,
    returns="()",
    writes=(
        *(
            "k_pages",
            "v_pages",
            "k_params",
            "v_params",
            "score_pages",
            "pos_pages",
            "k_tail",
            "v_tail",
            "lens",
            "qlens",
        ),
        *("next_table", "threshold"),
    ),
)


@cache_update_quantized_op
def cache_update_quantized(
    new: NewTokens,
    rows: Rows,
    cache: QuantizedCache,
    codes: Codes,
    scheme: Scheme,
    eviction: Eviction,
    ragged: Ragged,
) -> None:
    """`cache_update` where all but the newest slots are quantized."""
    k, v = new.k, new.v
    why: str | None
    if k.shape[2] != 1:
        why = f"it takes one token per row, not {k.shape[2]}"
    elif any(x is not None for x in ragged):
        why = "heads that share budgets, or merging"
    else:
        why = why_not(scheme, k.shape[3], v.shape[3])
    if fused("cache_update_quantized", k, why):
        from kvrewrite.kernels.quantized.update import decode_update_quantized

        stored = NewTokens(k.to(codes.k_tail.dtype), v.to(codes.v_tail.dtype), *new[2:])
        decode_update_quantized(stored, rows, cache, codes, scheme, eviction)
        return
    reference.cache_update(new, rows, cache, codes, scheme, eviction, ragged)


@cache_update_quantized_op.fake
def _(
    new: NewTokens,
    rows: Rows,
    cache: QuantizedCache,
    codes: Codes,
    scheme: Scheme,
    eviction: Eviction,
    ragged: Ragged,
) -> None:
    return None


decode_attention_quantized_op = define(
    "decode_attention_quantized",
    Tokens,
    Codes,
    QuantizedPages,
    At,
    Fields(Logits, "sinks alibi"),
    Scheme,
    Fields(Logits, "scale softcap window chunk"),
    "bool mass",
    returns="(Tensor, Tensor, Tensor)",
)


@decode_attention_quantized_op
def decode_attention_quantized(
    tokens: Tokens, codes: Codes, cache: QuantizedPages, at: At, logits: Logits, scheme: Scheme, mass: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_attention` on a quantized cache, whose keys and values the kernel reads as they are stored. Returns the same."""
    q, k, v = tokens
    if fused("decode_attention_quantized", q, why_not(scheme, q.shape[3], v.shape[3], q.shape[1] // k.shape[1])):
        from kvrewrite.kernels.quantized.decode import decode_attention_quantized as kernel

        out, lse, found = kernel(tokens, codes, cache, at, logits, scheme, mass)
        return out, lse, lse.new_empty(0) if found is None else found
    dense = Dense(*(pool.read(cache.table, cache.qlens, scheme, x == "v") for x, pool in reference.pools(codes)))
    pages = Pages(codes.k_pages, codes.v_pages, cache.pos_pages, cache.table, cache.lens)
    return decode_attention(tokens, dense, pages, at, logits, TokenOptions(mass))


@decode_attention_quantized_op.fake
def _(
    tokens: Tokens, codes: Codes, cache: QuantizedPages, at: At, logits: Logits, scheme: Scheme, mass: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_token(tokens, cache.table, codes.k_pages, mass)
