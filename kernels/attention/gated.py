"""Attention-Gate prefill on the GPU: the work falls with the share of new tokens that the gate evicts.

Masks would not save any: at random, hardly a tile of keys is evicted as a whole. So `_compact` first gathers the
retained new keys and values of each kv head, in order, with their indices and how many there are up to each token. A
block of queries then attends to the live cache, to the retained keys up to its own end (the last tiles masked by
index), and each evicted token to itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.attention.column_mass import (
    DTYPES,
    LOG2E,
    _bytes,
    in_reach,
    load_parts,
    logits_of,
    soft_cap,
)
from kvrewrite.kernels.groups import At, Logits, Slots, Tokens
from kvrewrite.kernels.limits import split_width, why_not

COMPACT_ROWS = 64  # tokens a program of `_compact` moves


def config(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile sizes by the larger head dim: query rows and keys a step, warps, stages."""
    if dtype == torch.float32:
        block_n, warps = (32, 4) if width <= 64 else (16, 8)
        return {"BLOCK_M": 32, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 2}
    if width <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3 if width <= 128 else 2}


@triton.jit
def _compact(
    K, V, HIDES, VALID, POS, KG, VG, COUNT, INDEX, PLACE,
    k_b, k_h, k_t, v_b, v_h, v_t, h_b, h_h, h_t, p_b, p_t, T,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Retained new tokens in order: keys KG (B, Hkv, T, D), values VG (B, Hkv, T, DV), INDEX and PLACE (their
    positions); COUNT[i]: how many of them are at or before token i."""
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + hk
    i0 = tl.program_id(0) * BLOCK
    valid = tl.minimum(tl.load(VALID + b), T)
    hides = HIDES + b * h_b + hk * h_h
    # Counting the earlier blocks' flags again costs less than a second launch: they are bytes.
    found = tl.zeros([SCAN], tl.int32)
    for at in range(0, i0, SCAN):
        i = at + tl.arange(0, SCAN)
        ok = (i < i0) & (i < valid)
        found += (ok & (tl.load(hides + i.to(tl.int64) * h_t, mask=ok, other=1) == 0)).to(tl.int32)
    before = tl.sum(found, 0)
    i = i0 + tl.arange(0, BLOCK)
    i64 = i.to(tl.int64)
    retained = (i < valid) & (tl.load(hides + i64 * h_t, mask=i < valid, other=1) == 0)
    count = before + tl.cumsum(retained.to(tl.int32), 0)
    tl.store(COUNT + head * T + i, count, mask=i < T)
    to = count - 1
    tl.store(INDEX + head * T + to, i, mask=retained)
    place = tl.load(POS + b * p_b + i64 * p_t, mask=retained, other=0).to(tl.int32)
    tl.store(PLACE + head * T + to, place, mask=retained)
    d = tl.arange(0, DP)
    ok = retained[:, None] & (d < D)[None, :]
    x = tl.load(K + b * k_b + hk.to(tl.int64) * k_h + i64[:, None] * k_t + d[None, :], mask=ok, other=0.0)
    tl.store(KG + head * T * D + to[:, None] * D + d[None, :], x, mask=ok)
    d = tl.arange(0, DVP)
    ok = retained[:, None] & (d < DV)[None, :]
    x = tl.load(V + b * v_b + hk.to(tl.int64) * v_h + i64[:, None] * v_t + d[None, :], mask=ok, other=0.0)
    tl.store(VG + head * T * DV + to[:, None] * DV + d[None, :], x, mask=ok)


@triton.jit
def _attend(
    m, total, acc0, acc1, q0, q1, keys, values, lo, hi, index_at, place_at, row, q_pos, slope, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
    DV1: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ALIBI: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Running maximum m (in units of log 2), total weight and output acc of query rows, after keys [lo, hi) of a
    segment. MASKED: hi may lie inside a tile; CAUSAL: the keys' indices among the new tokens decide what a row sees."""
    for start in tl.range(lo, hi, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < hi if MASKED else n >= 0
        k_pos = n
        if MASKED:
            if WINDOW > 0 or CHUNK > 0 or ALIBI:
                k_pos = tl.load(place_at + n, mask=ok, other=0)
            k0, k1 = load_parts(keys + n * D, ok, D, D0, D1)
            k0, k1 = k0.to(q0.dtype), k1.to(q0.dtype)
            x = logits_of(q0, q1, k0, k1, scale, q_pos, k_pos, slope, D1, SOFTCAP, ALIBI)
            seen = ok[None, :]
            if CAUSAL:
                index = tl.load(index_at + n, mask=ok, other=2147483647)
                seen = seen & (index[None, :] <= row[:, None])
            if WINDOW > 0 or CHUNK > 0:
                seen = seen & in_reach(q_pos, k_pos, WINDOW, CHUNK)
            x = tl.where(seen, x, float("-inf"))
            higher = tl.maximum(m, tl.max(x, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(x - base[:, None])
        else:
            k0 = tl.load(
                keys + n[:, None] * D + tl.arange(0, D0)[None, :], mask=(tl.arange(0, D0) < D)[None, :], other=0.0
            )
            k0 = k0.to(q0.dtype)
            s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            if D1 > 0:
                d1 = D0 + tl.arange(0, D1)
                k1 = tl.load(keys + n[:, None] * D + d1[None, :], mask=(d1 < D)[None, :], other=0.0).to(q0.dtype)
                s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
            if SOFTCAP > 0:
                x = soft_cap(s * scale, SOFTCAP) * LOG2E
                higher = tl.maximum(m, tl.max(x, 1))
                p = tl.exp2(x - higher[:, None])
            else:  # scale is positive, so the maximum can be scaled instead of every logit
                higher = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
                p = tl.exp2(s * (scale * LOG2E) - higher[:, None])
            base = higher
        fade = tl.exp2(m - base)
        m = higher
        total = total * fade + tl.sum(p, 1)
        acc0 = acc0 * fade[:, None]
        if DV1 > 0:
            acc1 = acc1 * fade[:, None]
        v0, v1 = load_parts(values + n * DV, ok, DV, DV0, DV1)
        acc0 = tl.dot(p.to(q0.dtype), v0.to(q0.dtype), acc0, input_precision="ieee")
        if DV1 > 0:
            acc1 = tl.dot(p.to(q0.dtype), v1.to(q0.dtype), acc1, input_precision="ieee")
    return m, total, acc0, acc1


@triton.jit
def _gated_attention(
    Q, K, V, KC, VC, KG, VG, COUNT, INDEX, PLACE, HIDES, LENS, CACHE_POS, POS, VALID, SINKS, SLOPES, OUT, LSE, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, h_b, h_h, h_t, n_b, n_h, p_b, p_t, C, T,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
    DV1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, ALIBI: tl.constexpr, WITH_SINKS: tl.constexpr,
):  # fmt: skip
    POSITIONS: tl.constexpr = WINDOW > 0 or CHUNK > 0 or ALIBI
    h = tl.program_id(1)
    hk = h // G
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    head = b * (heads // G) + hk
    # Late blocks see most keys: they start first.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = m0 + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    valid = tl.minimum(tl.load(VALID + b), T)
    real = row < valid
    q0, q1 = load_parts(Q + b * q_b + h.to(tl.int64) * q_h + row64 * q_t, real, D, D0, D1)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope += tl.load(SLOPES + h).to(tl.float32)
    q_pos = row
    if POSITIONS:
        q_pos = tl.load(POS + b * p_b + row64 * p_t, mask=real, other=0).to(tl.int32)

    # A token that is hidden from the others sees itself; its own key is the first that its row sees.
    alone = real & (tl.load(HIDES + b * h_b + hk * h_h + row64 * h_t, mask=real, other=0) != 0)
    k0, k1 = load_parts(K + b * k_b + hk.to(tl.int64) * k_h + row64 * k_t, alone, D, D0, D1)
    x = tl.sum(q0.to(tl.float32) * k0.to(tl.float32), 1)
    if D1 > 0:
        x += tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1)
    x = x * scale
    if SOFTCAP > 0:
        x = soft_cap(x, SOFTCAP)
    m = tl.where(alone, x * LOG2E, float("-inf"))
    total = tl.where(alone, 1.0, 0.0)
    v0, v1 = load_parts(V + b * v_b + hk.to(tl.int64) * v_h + row64 * v_t, alone, DV, DV0, DV1)
    acc0 = v0.to(tl.float32)
    acc1 = tl.zeros([BLOCK_M, 16], tl.float32)
    if DV1 > 0:
        acc1 = v1.to(tl.float32)

    cached = tl.minimum(tl.load(LENS + b * n_b + hk * n_h), C)
    seen_by_all, seen_by_any, first = 0, 0, 0
    if m0 < valid:
        seen_by_all = tl.load(COUNT + head * T + m0)
        seen_by_any = tl.load(COUNT + head * T + tl.minimum(m0 + BLOCK_M, valid) - 1)
    else:
        cached = 0
    keys, values, places = KC + head * C * D, VC + head * C * DV, CACHE_POS + head * C
    indices = INDEX + head * T
    full = 0
    if not POSITIONS:
        full = cached // BLOCK_N * BLOCK_N
        m, total, acc0, acc1 = _attend(
            m, total, acc0, acc1, q0, q1, keys, values, 0, full, indices, places, row, q_pos, slope, scale, BLOCK_N, D, D0, D1,
            DV, DV0, DV1, SOFTCAP, WINDOW, CHUNK, ALIBI, False, False,
        )  # fmt: skip
    m, total, acc0, acc1 = _attend(
        m, total, acc0, acc1, q0, q1, keys, values, full, cached, indices, places, row, q_pos, slope, scale, BLOCK_N, D, D0, D1,
        DV, DV0, DV1, SOFTCAP, WINDOW, CHUNK, ALIBI, True, False,
    )  # fmt: skip
    keys, values, places = KG + head * T * D, VG + head * T * DV, PLACE + head * T
    if POSITIONS:
        if WINDOW > 0 or CHUNK > 0:
            # Positions grow by 1 a token or faster: no row of this block reaches a token before this one.
            REACH: tl.constexpr = WINDOW if CHUNK == 0 else (CHUNK if WINDOW == 0 or CHUNK < WINDOW else WINDOW)
            if (m0 >= REACH) & (m0 < valid):
                first = tl.load(COUNT + head * T + m0 - REACH) // BLOCK_N * BLOCK_N
    else:
        first = seen_by_all // BLOCK_N * BLOCK_N
        m, total, acc0, acc1 = _attend(
            m, total, acc0, acc1, q0, q1, keys, values, 0, first, indices, places, row, q_pos, slope, scale, BLOCK_N, D, D0, D1,
            DV, DV0, DV1, SOFTCAP, WINDOW, CHUNK, ALIBI, False, False,
        )  # fmt: skip
    m, total, acc0, acc1 = _attend(
        m, total, acc0, acc1, q0, q1, keys, values, first, seen_by_any, indices, places, row, q_pos, slope, scale, BLOCK_N, D, D0,
        D1, DV, DV0, DV1, SOFTCAP, WINDOW, CHUNK, ALIBI, True, True,
    )  # fmt: skip

    if WITH_SINKS:
        sink = tl.load(SINKS + h).to(tl.float32) * LOG2E
        higher = tl.maximum(m, sink)
        fade = tl.exp2(m - higher)
        total = total * fade + tl.exp2(sink - higher)
        acc0 = acc0 * fade[:, None]
        acc1 = acc1 * fade[:, None]
        m = higher
    some = tl.where(total == 0, 1.0, total)
    out = OUT + ((b * T + row64) * heads + h) * DV
    d = tl.arange(0, DV0)
    stored = (acc0 / some[:, None]).to(OUT.dtype.element_ty)
    tl.store(out[:, None] + d[None, :], stored, mask=(row < T)[:, None] & (d < DV)[None, :])
    if DV1 > 0:
        d = DV0 + tl.arange(0, DV1)
        stored = (acc1 / some[:, None]).to(OUT.dtype.element_ty)
        tl.store(out[:, None] + d[None, :], stored, mask=(row < T)[:, None] & (d < DV)[None, :])
    tl.store(LSE + (b * heads + h) * T + row, (m + tl.log2(some)) / LOG2E, mask=row < T)


def compact(
    k: Tensor, v: Tensor, hidden: Tensor, positions: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gathers the new tokens of each head that are real and not hidden, in order; arguments as in `gated_attention`.

    Returns their keys (B, Hkv, T, D) and values (B, Hkv, T, Dv), then int32 (B, Hkv, T): count, how many of them there
    are at or before each token; index, which token each is; place, its position. After the last, all but count are
    undefined.
    """
    b, hkv, t, d = k.shape
    dv = v.shape[3]
    kept_k = torch.empty(b, hkv, t, d, dtype=k.dtype, device=k.device)
    kept_v = torch.empty(b, hkv, t, dv, dtype=v.dtype, device=k.device)
    count, index, place = torch.empty(3, b, hkv, t, dtype=torch.int32, device=k.device)
    hides = _bytes(hidden)
    _compact[(triton.cdiv(t, COMPACT_ROWS), hkv, b)](
        k, v, hides, valid, positions, kept_k, kept_v, count, index, place,
        *k.stride()[:3], *v.stride()[:3], *hides.stride(), *positions.stride(), t,
        D=d, DV=dv, DP=triton.next_power_of_2(d), DVP=triton.next_power_of_2(dv), BLOCK=COMPACT_ROWS, SCAN=2048, num_warps=4,
    )  # fmt: skip
    return kept_k, kept_v, count, index, place


def gated_attention(
    tokens: Tokens, slots: Slots, at: At, logits: Logits, tiles: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens on [live cache slots] + [the new tokens that stay, causal] + [themselves].

    q, k and v are all fp16, bf16 or fp32 with contiguous channels; hidden is given and scale positive. positions grow
    along a row, all slots are before positions[:, 0]. tiles replaces what `config` gives.

    Returns out (B, H, T, Dv), a view of (B, T, H, Dv) in memory, and the natural log-sum-exp (B, H, T) fp32. Rows that
    see nothing give 0 and -inf (with sinks, the sink's logit).

    ValueError: a dtype, head dims or a scale that there is no kernel for, or cache_pos missing where it is needed.
    """
    (q, k, v), (k_cache, v_cache, lens, cache_pos), (positions, valid) = tokens, slots, at
    sinks, alibi, hidden, scale, softcap, window, chunk = logits
    assert hidden is not None
    b, h, t, d = q.shape
    hkv, c, dv = k.shape[1], k_cache.shape[2], v.shape[3]
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"gated_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected the same of {DTYPES}")
    if why := why_not(d, dv, h // hkv, t, True, 8 * q.itemsize):
        raise ValueError(f"gated_attention: {why}")
    if scale <= 0:
        raise ValueError(f"gated_attention: scale is {scale}, expected a positive number")
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("gated_attention: expected q, k and v with contiguous channels")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("gated_attention: expected k_cache and v_cache contiguous")
    if logits.placed and c and (cache_pos is None or not cache_pos.is_contiguous()):
        raise ValueError("gated_attention: window, chunk and alibi need cache_pos, contiguous")
    out = torch.empty(b, t, h, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out.transpose(1, 2), lse
    hides = _bytes(hidden)
    kept_k, kept_v, count, index, place = compact(k, v, hides, positions, valid)
    (d0, d1), (dv0, dv1) = split_width(d), split_width(dv)
    chosen = config(q.dtype, max(d, dv)) if tiles is None else tiles
    none = valid  # stands for a tensor that is not read
    _gated_attention[(triton.cdiv(t, chosen["BLOCK_M"]), h, b)](
        q, k, v, k_cache, v_cache, kept_k, kept_v, count, index, place, hides, lens,
        none if cache_pos is None else cache_pos, positions, valid, none if sinks is None else sinks,
        none if alibi is None else alibi, out, lse, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *hides.stride(), *lens.stride(), *positions.stride(), c, t,
        G=h // hkv, D=d, D0=d0, D1=d1, DV=dv, DV0=dv0, DV1=dv1, SOFTCAP=float(softcap), WINDOW=window, CHUNK=chunk,
        ALIBI=alibi is not None, WITH_SINKS=sinks is not None, **chosen,
    )  # fmt: skip
    return out.transpose(1, 2), lse
