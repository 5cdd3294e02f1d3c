"""Column mass on the GPU: how much attention each cached slot and new token received from weighted query rows.

One program per (block of keys, kv head, batch row): its keys stay on the chip, the query rows of all heads of the group
stream past with their log-sum-exp, and each tile of weights is rebuilt from it, w = exp(logit - lse). A tile of partial
sums is added up once, at the end, so nothing is atomic and the result has the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.groups import At, KeySlots, Logits, Watch
from kvrewrite.kernels.limits import split_width

LOG2E = tl.constexpr(1.4426950408889634)
FLAT_ROWS = 128  # up to so many query rows, those of all heads of a group are one dimension: no half-empty tiles
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def config(dtype: torch.dtype, width: int, rows: int, group: int) -> dict[str, int]:
    """Tile sizes: keys per program, query rows per step, warps, stages, registers. rows: query rows per head at
    most."""
    flat = rows <= FLAT_ROWS
    block_r = min(64, max(16, triton.next_power_of_2(rows * group))) if flat else 64
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_R": min(16 if flat else 32, block_r), "num_warps": 8, "STAGES": 2}
    if flat:
        warps = 8 if block_r == 64 and width in (64, 128) else 4
        return {"BLOCK_N": 128 if width <= 128 else 64, "BLOCK_R": block_r, "num_warps": warps, "STAGES": 1}
    if width in (64, 128):
        # 128 registers let two programs share a multiprocessor: one's exponentials hide the other's products.
        return {"BLOCK_N": 128, "BLOCK_R": 64, "num_warps": 8, "STAGES": 3, "maxnreg": 128}
    if width == 256:
        return {"BLOCK_N": 128, "BLOCK_R": 64, "num_warps": 8, "STAGES": 2}
    return {"BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 4, "STAGES": 2}  # two dots a tile: all warps along the rows


@triton.jit
def soft_cap(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP), by an exponential that can't overflow."""
    e = tl.exp2(tl.abs(x) * (-2.0 / CAP * LOG2E))
    y = CAP * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def load_parts(rows, ok, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of D channels, given by pointers to their first, as the two parts of `split_width`; 0 where not ok."""
    d0 = tl.arange(0, D0)
    if D0 > D:
        x0 = tl.load(rows[:, None] + d0[None, :], mask=ok[:, None] & (d0 < D)[None, :], other=0.0)
    else:
        x0 = tl.load(rows[:, None] + d0[None, :], mask=ok[:, None], other=0.0)
    x1 = x0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        if D0 + D1 > D:
            x1 = tl.load(rows[:, None] + d1[None, :], mask=ok[:, None] & (d1 < D)[None, :], other=0.0)
        else:
            x1 = tl.load(rows[:, None] + d1[None, :], mask=ok[:, None], other=0.0)
    return x0, x1


@triton.jit
def logits_of(
    q0, q1, k0, k1, scale, q_pos, k_pos, slope, D1: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr
):  # fmt: skip
    """Logits (rows, keys) in units of log 2, not masked."""
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    if SOFTCAP > 0:
        x = soft_cap(s * scale, SOFTCAP) * LOG2E
    else:
        x = s * (scale * LOG2E)
    if ALIBI:
        x -= slope[:, None] * LOG2E * (q_pos[:, None] - k_pos[None, :]).to(tl.float32)
    return x


@triton.jit
def in_reach(q_pos, k_pos, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Which keys (rows, keys) the window and the chunk by original position let through."""
    distance = q_pos[:, None] - k_pos[None, :]
    seen = distance >= 0
    if WINDOW > 0:
        seen &= distance < WINDOW
    if CHUNK > 0:
        seen &= (q_pos // CHUNK)[:, None] == (k_pos // CHUNK)[None, :]
    return seen


@triton.jit
def _add_tile(
    acc, k0, k1, key, key_pos, hides, q_rows, row, ok, lse_at, weight_at, above_at, pos_at, slope, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ALIBI: tl.constexpr, HIDDEN: tl.constexpr, ABOVE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """acc (rows, keys) plus the weighted attention of a tile of query rows, row[i] being their index among the new
    tokens."""
    q0, q1 = load_parts(q_rows, ok, D, D0, D1)
    weight = tl.load(weight_at, mask=ok, other=0).to(tl.float32)
    lse = tl.load(lse_at, mask=ok, other=0.0)
    lse = tl.where(tl.abs(lse) == float("inf"), 0.0, lse) * LOG2E
    q_pos = row
    if WINDOW > 0 or CHUNK > 0 or ALIBI:
        q_pos = tl.load(pos_at, mask=ok, other=0).to(tl.int32)
    x = logits_of(q0, q1, k0, k1, scale, q_pos, key_pos, slope, D1, SOFTCAP, ALIBI)
    # A row without weight may hold anything, NaN too.
    seen = (weight != 0)[:, None]
    if CAUSAL:
        seen = seen & (key[None, :] <= row[:, None])
        if HIDDEN:
            seen = seen & ((hides == 0)[None, :] | (key[None, :] == row[:, None]))
    if WINDOW > 0 or CHUNK > 0:
        seen = seen & in_reach(q_pos, key_pos, WINDOW, CHUNK)
    p = tl.exp2(tl.where(seen, x - lse[:, None], float("-inf")))
    if ABOVE:
        p = tl.where(p > tl.load(above_at, mask=ok, other=0.0).to(tl.float32)[:, None], 1.0, 0.0)
    return acc + p * weight[:, None]


@triton.jit
def _add_flat(
    acc, k0, k1, key, key_pos, hides, q_base, q_h, q_t, lse_base, l_h, l_t, weight_base, r_t, above_base, a_t, pos_base, p_t,
    slopes, first_row, count, scale, G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_R: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ALIBI: tl.constexpr,
    HIDDEN: tl.constexpr, ABOVE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """acc plus the attention of rows [first_row, first_row + count) of all G heads, taken as one dimension."""
    slope = tl.zeros([BLOCK_R], tl.float32)
    for at in tl.range(0, count * G, BLOCK_R, num_stages=1):
        flat = at + tl.arange(0, BLOCK_R)
        if G > 8:
            g = flat // count
        else:  # cheaper than a division
            g = tl.zeros([BLOCK_R], tl.int32)
            for i in tl.static_range(1, G):
                g += (flat >= i * count).to(tl.int32)
        row, ok = first_row + flat - g * count, flat < count * G
        if ALIBI:
            slope = tl.load(slopes + g, mask=ok, other=0.0).to(tl.float32)
        row64, g64 = row.to(tl.int64), g.to(tl.int64)
        acc = _add_tile(
            acc, k0, k1, key, key_pos, hides, q_base + g64 * q_h + row64 * q_t, row, ok, lse_base + g64 * l_h + row64 * l_t,
            weight_base + row64 * r_t, above_base + row64 * a_t, pos_base + row64 * p_t, slope, scale, D, D0, D1, SOFTCAP,
            WINDOW, CHUNK, ALIBI, HIDDEN, ABOVE, CAUSAL,
        )  # fmt: skip
    return acc


@triton.jit
def _column_mass(
    Q, K, KC, LSE, ROWS, ABOVE_AT, LENS, CACHE_POS, POS, VALID, SLOPES, HIDES, OUT, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, l_b, l_h, l_t, r_b, r_t, a_b, a_t, n_b, n_h, p_b, p_t, h_b, h_h, h_t,
    C, T, newest,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, FLAT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ALIBI: tl.constexpr, HIDDEN: tl.constexpr, ABOVE: tl.constexpr,
):  # fmt: skip
    POSITIONS: tl.constexpr = WINDOW > 0 or CHUNK > 0 or ALIBI
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + hk
    blocks_c = tl.cdiv(C, BLOCK_N)
    is_new = tl.program_id(0) >= blocks_c
    n0 = (tl.program_id(0) - tl.where(is_new, blocks_c, 0)) * BLOCK_N
    key = n0 + tl.arange(0, BLOCK_N)
    valid = tl.minimum(tl.load(VALID + b), T)
    first_row = tl.where(newest > 0, tl.maximum(valid - newest, 0), 0)
    last_row = valid  # not included
    # The keys, once; each segment has its own load, so that both are vectorized.
    if is_new:
        live = key < valid
        new_rows = K + b * k_b + hk.to(tl.int64) * k_h + n0.to(tl.int64) * k_t + tl.arange(0, BLOCK_N) * k_t
        k0, k1 = load_parts(new_rows, live, D, D0, D1)
        k0, k1 = k0.to(Q.dtype.element_ty), k1.to(Q.dtype.element_ty)
    else:
        live = key < tl.minimum(tl.load(LENS + b * n_b + hk * n_h), C)
        cached_rows = KC + head * C * D + key * D
        k0, k1 = load_parts(cached_rows, live, D, D0, D1)
        k0, k1 = k0.to(Q.dtype.element_ty), k1.to(Q.dtype.element_ty)
    key_pos = key
    if POSITIONS:
        if is_new:
            key_pos = tl.load(POS + b * p_b + key.to(tl.int64) * p_t, mask=live, other=0).to(tl.int32)
        else:
            key_pos = tl.load(CACHE_POS + head * C + key, mask=live, other=0).to(tl.int32)
    if WINDOW > 0 or CHUNK > 0:
        # Positions grow by 1 a row or faster, so rows from here on are out of reach of all these keys.
        REACH: tl.constexpr = WINDOW if CHUNK == 0 else (CHUNK if WINDOW == 0 or CHUNK < WINDOW else WINDOW)
        newest_key = tl.max(tl.where(live, key_pos, -1), 0)
        begin = tl.load(POS + b * p_b).to(tl.int32)
        last_row = tl.minimum(last_row, tl.maximum(newest_key + REACH - begin, 0))
    if not is_new:
        last_row = tl.where(tl.max(live.to(tl.int32), 0) > 0, last_row, 0)
    hides = tl.zeros([BLOCK_N], tl.int32)
    if HIDDEN:  # noqa: SIM102 (one is decided at compile time, the other at run time)
        if is_new:
            hides = tl.load(HIDES + b * h_b + hk * h_h + key.to(tl.int64) * h_t, mask=live, other=0).to(tl.int32)

    heads = hk * G
    q_base = Q + b * q_b + heads.to(tl.int64) * q_h
    lse_base = LSE + b * l_b + heads.to(tl.int64) * l_h
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    span = tl.arange(0, BLOCK_R)
    slope = span.to(tl.float32)
    # Index of the last key that a row sees: rows of a cached block see all of it.
    bound = tl.where(is_new, key, -1)
    if FLAT:
        if is_new:
            first_row = tl.minimum(tl.maximum(first_row, n0), last_row)
        count = tl.maximum(last_row - first_row, 0)
        if is_new and n0 + BLOCK_N - 1 > first_row:
            acc = _add_flat(
                acc, k0, k1, bound, key_pos, hides, Q + b * q_b + heads.to(tl.int64) * q_h, q_h, q_t,
                LSE + b * l_b + heads.to(tl.int64) * l_h, l_h, l_t, ROWS + b * r_b, r_t, ABOVE_AT + b * a_b, a_t,
                POS + b * p_b, p_t, SLOPES + heads, first_row, count, scale, G, D, D0, D1, BLOCK_R, SOFTCAP, WINDOW, CHUNK,
                ALIBI, HIDDEN, ABOVE, True,
            )  # fmt: skip
        else:
            acc = _add_flat(
                acc, k0, k1, bound, key_pos, hides, Q + b * q_b + heads.to(tl.int64) * q_h, q_h, q_t,
                LSE + b * l_b + heads.to(tl.int64) * l_h, l_h, l_t, ROWS + b * r_b, r_t, ABOVE_AT + b * a_b, a_t,
                POS + b * p_b, p_t, SLOPES + heads, first_row, count, scale, G, D, D0, D1, BLOCK_R, SOFTCAP, WINDOW, CHUNK,
                ALIBI, HIDDEN, ABOVE, False,
            )  # fmt: skip
            if HIDDEN:
                acc = tl.where((hides == 0)[None, :], acc, 0.0)
    else:
        # Rows after the block's last key see all of it; they need no causal mask.
        clear = first_row
        if is_new:
            first_row = tl.maximum(first_row, n0)
            clear = tl.maximum(first_row, n0 + BLOCK_N)
        for g in range(G):
            if ALIBI:
                slope = tl.zeros([BLOCK_R], tl.float32) + tl.load(SLOPES + heads + g).to(tl.float32)
            for at in tl.range(clear, last_row, BLOCK_R, num_stages=STAGES):
                start, row = tl.cast(at, tl.int64), at + span
                acc = _add_tile(
                    acc, k0, k1, bound, key_pos, hides, q_base + g * q_h + start * q_t + span * q_t, row, row < last_row,
                    lse_base + g * l_h + start * l_t + span * l_t, ROWS + b * r_b + start * r_t + span * r_t,
                    ABOVE_AT + b * a_b + start * a_t + span * a_t, POS + b * p_b + start * p_t + span * p_t, slope, scale,
                    D, D0, D1, SOFTCAP, WINDOW, CHUNK, ALIBI, HIDDEN, ABOVE, False,
                )  # fmt: skip
        if is_new:
            if HIDDEN:  # no later row sees a hidden key
                acc = tl.where((hides == 0)[None, :], acc, 0.0)
            stop = tl.minimum(clear, last_row)
            for g in range(G):
                if ALIBI:
                    slope = tl.zeros([BLOCK_R], tl.float32) + tl.load(SLOPES + heads + g).to(tl.float32)
                for at in tl.range(first_row, stop, BLOCK_R, num_stages=1):
                    start, row = tl.cast(at, tl.int64), at + span
                    acc = _add_tile(
                        acc, k0, k1, bound, key_pos, hides, q_base + g * q_h + start * q_t + span * q_t, row, row < stop,
                        lse_base + g * l_h + start * l_t + span * l_t, ROWS + b * r_b + start * r_t + span * r_t,
                        ABOVE_AT + b * a_b + start * a_t + span * a_t, POS + b * p_b + start * p_t + span * p_t, slope,
                        scale, D, D0, D1, SOFTCAP, WINDOW, CHUNK, ALIBI, HIDDEN, ABOVE, True,
                    )  # fmt: skip
    mass = tl.where(live, tl.sum(acc, 0), 0.0)
    shift = tl.where(is_new, C, 0)
    tl.store(OUT + head * (C + T) + shift + key, mass, mask=key < tl.where(is_new, T, C))


def _bytes(x: Tensor) -> Tensor:
    """Booleans as bytes, without a copy."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def column_mass(
    watch: Watch,
    slots: KeySlots,
    at: At,
    logits: Logits,
    tiles: dict[str, int] | None = None,
) -> Tensor:
    """Attention mass of every cached slot and new token under weighted query rows: (B, Hkv, C + T) fp32, summed over
    the query heads of each group; 0 for what is not live.

    q and k are both fp16, bf16 or fp32 with contiguous channels; a row of weight 0 or after `valid` may hold anything.
    positions grow along a row, all slots are before positions[:, 0]. Thresholds are at least 0. tiles replaces what
    `config` gives.

    ValueError: a dtype that there is no kernel for, or cache_pos missing where it is needed.
    """
    (q, k, lse, rows, above, newest), (k_cache, lens, cache_pos), (positions, valid) = watch, slots, at
    _, alibi, hidden, scale, softcap, window, chunk = logits
    b, h, t, d = q.shape
    hkv, c = k.shape[1], k_cache.shape[2]
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise ValueError(f"column_mass: q is {q.dtype} and k {k.dtype}, expected the same of {DTYPES}")
    if q.stride(3) != 1 or k.stride(3) != 1 or not k_cache.is_contiguous():
        raise ValueError("column_mass: expected q and k with contiguous channels, and k_cache contiguous")
    if logits.placed and c and (cache_pos is None or not cache_pos.is_contiguous()):
        raise ValueError("column_mass: window, chunk and alibi need cache_pos, contiguous")
    out = torch.empty(b, hkv, c + t, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    rows = _bytes(rows)
    hides = None if hidden is None else _bytes(hidden)
    count = min(newest, t) if newest else t
    d0, d1 = split_width(d)
    chosen = dict(config(q.dtype, d, count, h // hkv) if tiles is None else tiles)
    grid = (triton.cdiv(c, chosen["BLOCK_N"]) + triton.cdiv(t, chosen["BLOCK_N"]), hkv, b)
    none = valid  # stands for a tensor that is not read
    _column_mass[grid](
        q, k, k_cache, lse, rows, none if above is None else above, lens, none if cache_pos is None else cache_pos, positions,
        valid, none if alibi is None else alibi, none if hides is None else hides, out, scale,
        *q.stride()[:3], *k.stride()[:3], *lse.stride(), *rows.stride(), *((0, 0) if above is None else above.stride()),
        *lens.stride(), *positions.stride(), *((0, 0, 0) if hides is None else hides.stride()),
        c, t, newest,
        G=h // hkv, D=d, D0=d0, D1=d1, FLAT=count <= FLAT_ROWS, SOFTCAP=float(softcap), WINDOW=window, CHUNK=chunk,
        ALIBI=alibi is not None, HIDDEN=hides is not None, ABOVE=above is not None, **chosen,
    )  # fmt: skip
    return out
