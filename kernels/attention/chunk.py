"""Attention of a chunk of new tokens on [live cache slots] + [the new tokens, causal]: the prefill kernel, and its
routes.

`chunk_attention` is the entry point. It has three routes to the same result:

- "hopper": chunk_attention_hopper.py, warp-specialized, for the plain case on compute capability 9.0;
- "triton": the kernel below, for everything: window, chunk, softcap, ALiBi, attention sinks, hidden tokens, any head dimension;
- "cudnn": two calls of cuDNN's attention and a merge by LSE (`merged_sdpa`), where every cache is full: a baseline.

"auto" takes what `choose_route` says, a function of shapes, dtypes and options only.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kvrewrite.kernels.groups import At, Logits, Slots, Tokens
from kvrewrite.kernels.limits import split_width, why_not

ROUTES = ("auto", "hopper", "triton", "cudnn")
HOPPER_DIMS = (64, 128, 256)  # head dimensions of the warp-specialized kernel, equal for keys and values


L2_BYTES = 32 << 20  # of keys and values that programs running at the same time share: well under an H100's 50 MB


def heads_together(heads: int, group: int, keys: int, bytes_a_key: int) -> int:
    """How many query heads (of `heads`, all rows of the batch) programs should work on at the same time: all, if L2
    holds the `keys` keys and values, of bytes_a_key together, of each of their kv heads; else those of one kv head, a
    group."""
    return heads if heads // group * keys * bytes_a_key <= L2_BYTES else group


class Config(NamedTuple):
    """Tile of the portable kernel: query rows, keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def portable_config(dtype: torch.dtype, d: int, dv: int, t: int, features: tuple[str, ...] = ()) -> Config:
    """The tile for a dtype, head dimensions, number of new tokens and options. Frozen: edit it after measuring."""
    wide = max(d, dv)
    if dtype == torch.float32:  # no tensor cores: what does not spill is small
        if wide <= 64:
            return Config(64, 32, 8, 1)
        if wide <= 128:
            return Config(32, 32, 8, 1)
        return Config(16, 32, 8, 1) if wide <= 192 else Config(16, 16, 4, 1)
    if wide > 256:
        return Config(64, 32, 8, 2)
    if t <= 64:
        return Config(64, 64 if wide <= 128 else 32, 4, 2)
    if wide <= 128 and not features:
        return Config(128, 128, 8, 3)
    if wide > 192 and features:
        return Config(128, 32, 8, 2)
    return Config(128, 64, 8, 3 if wide <= 128 else 2)


# ------------------------------------------------------------------------------------------------ the portable kernel
@triton.jit
def _load(tile, real, N: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """Channels [FIRST, FIRST + WIDTH) of N of a tile of rows; zeros beyond N and, with MASK, in rows that are not
    real."""
    cols = FIRST + tl.arange(0, WIDTH)
    if MASK:
        return tl.load(tile + cols[None, :], mask=real[:, None] & (cols < N)[None, :], other=0.0)
    elif FIRST + WIDTH > N:
        return tl.load(tile + cols[None, :], mask=(cols < N)[None, :], other=0.0)
    else:
        return tl.load(tile + cols[None, :])


@triton.jit
def _keys(
    acc, acc_rest, m_i, l_i, q, q_rest, K, V, k_n, v_n, lo, hi, n_real, rows, q_pos, POS, HIDDEN_PTR,
    scale, softcap, window, chunk, slope,
    D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_N: tl.constexpr, NEW: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ALIBI: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [lo, hi) of one segment: the new tokens (NEW) or the cache. POS: their positions.

    n_real: how many of the segment's keys are real. MASK: tiles may hold keys that are not, or that come after a row's
    own token; without it all keys of a tile are visible, but for what the options hide. Channels are in two parts, D0 +
    D1 and V0 + V1, each a power of 2, so that 96 channels are not padded to 128. Logits and m_i are in powers of 2.
    """
    PLACED: tl.constexpr = WINDOW or CHUNK or ALIBI
    HIDES: tl.constexpr = PLACED or HIDDEN  # options by which a row may see nothing of a tile
    if SOFTCAP or ALIBI:
        factor = 1.0  # the logits are brought to powers of 2 before the maximum, otherwise after it
    else:
        factor = scale * 1.4426950408889634
    for start in tl.range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        real = cols < n_real
        # Offsets of whole rows in 64 bits, not of the tile and of rows in it: with those, ptxas has each wgmma wait for
        # the one before (C7515), which costs an eighth of the rate.
        k_tile = K + cols[:, None].to(tl.int64) * k_n
        v_tile = V + cols[:, None].to(tl.int64) * v_n
        k = _load(k_tile, real, D, 0, D0, MASK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D1 > 0:
            s = tl.dot(q_rest, tl.trans(_load(k_tile, real, D, D0, D1, MASK)), s, input_precision=PRECISION)
        if (
            SOFTCAP
        ):  # tanh(x) = 1 - 2 / (exp(2 x) + 1), which cancels near 0: there fp32 takes the first terms of its series
            x = s * (scale / softcap)
            tanh = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
            if PRECISION == "ieee":
                square = x * x
                series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.05396825)))
                tanh = tl.where(square < 0.04, series, tanh)
            s = (softcap * 1.4426950408889634) * tanh
        elif ALIBI:
            s = s * (scale * 1.4426950408889634)
        if PLACED:
            k_pos = tl.load(POS + cols, mask=real, other=0).to(tl.int32)
            distance = q_pos[:, None] - k_pos[None, :]
            if ALIBI:
                s -= (slope * 1.4426950408889634) * distance.to(tl.float32)
        if MASK or HIDES:
            seen = real[None, :]
            if NEW:
                seen = seen & (cols[None, :] <= rows[:, None])
            elif PLACED:
                seen = seen & (distance >= 0)
            if WINDOW:
                seen = seen & (distance < window)
            if CHUNK:
                seen = seen & ((q_pos // chunk)[:, None] == (k_pos // chunk)[None, :])
            if HIDDEN and NEW:
                shut = tl.load(HIDDEN_PTR + cols, mask=real, other=0).to(tl.int32)
                seen = seen & ((cols[None, :] == rows[:, None]) | (shut == 0)[None, :])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        if HIDES:  # a row may have seen nothing so far
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            shift = m_new
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        v = _load(v_tile, real, DV, 0, V0, MASK)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
        if V1 > 0:
            v_rest = _load(v_tile, real, DV, V0, V1, MASK)
            acc_rest = tl.dot(p, v_rest, acc_rest * alpha[:, None], input_precision=PRECISION)
    return acc, acc_rest, m_i, l_i


# Lengths that change from call to call compile once.
@triton.jit(do_not_specialize=["window", "chunk", "lens_b", "lens_h", "t", "batch_heads", "heads_at_once", "n_m"])
def _chunk_attention(
    Q, K, V, KC, VC, LENS, CACHE_POS, POSITIONS, VALID, SINK, SLOPE, HIDDEN_PTR, OUT, LSE,
    scale, softcap, window, chunk,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, lens_b, lens_h, pos_b, hidden_b, hidden_h,
    n_heads, group, t, capacity, batch_heads, heads_at_once, n_m,
    D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ALIBI: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head, in four loops, so that few tiles pay for masks: whole cache tiles,
    the cache's last tile, chunk tiles before the diagonal, diagonal tiles. Order of programs as in
    chunk_attention_hopper.py.

    UNIT: strides of q, k and v count so many elements each (`strides_in_units`).
    """
    if UNIT > 1:
        q_b, q_h, q_t = tl.cast(q_b, tl.int64) * UNIT, tl.cast(q_h, tl.int64) * UNIT, tl.cast(q_t, tl.int64) * UNIT
        k_b, k_h, k_t = tl.cast(k_b, tl.int64) * UNIT, tl.cast(k_h, tl.int64) * UNIT, tl.cast(k_t, tl.int64) * UNIT
        v_b, v_h, v_t = tl.cast(v_b, tl.int64) * UNIT, tl.cast(v_h, tl.int64) * UNIT, tl.cast(v_t, tl.int64) * UNIT
    PLACED: tl.constexpr = WINDOW or CHUNK or ALIBI
    pid = tl.program_id(0)
    first_head = pid // (n_m * heads_at_once) * heads_at_once
    rest = pid % (n_m * heads_at_once)
    together = tl.minimum(heads_at_once, batch_heads - first_head)
    bh = first_head + rest % together
    m0 = (n_m - 1 - rest // together) * BLOCK_M
    b = (bh // n_heads).to(tl.int64)
    h = bh % n_heads
    hk = (h // group).to(tl.int64)
    n_kv = n_heads // group

    in_tile = tl.arange(0, BLOCK_M)
    rows = m0 + in_tile
    inside = rows < t
    n_valid = tl.minimum(tl.load(VALID + b), t)
    q_tile = Q + b * q_b + h.to(tl.int64) * q_h + m0.to(tl.int64) * q_t + in_tile[:, None] * q_t
    q = _load(q_tile, inside, D, 0, D0, True)
    if D1 > 0:
        q_rest = _load(q_tile, inside, D, D0, D1, True)
    else:
        q_rest = q
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V0], tl.float32)
    if V1 > 0:
        acc_rest = tl.zeros([BLOCK_M, V1], tl.float32)
    else:
        acc_rest = l_i

    q_pos = rows
    if PLACED:
        q_pos = tl.load(POSITIONS + b * pos_b + rows, mask=inside, other=0).to(tl.int32)
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPE + h).to(tl.float32)

    # Rows from n_valid on get 0 and -inf; a program that has no others looks at no keys.
    active = (m0 < n_valid).to(tl.int32)
    n_live = tl.load(LENS + b * lens_b + hk * lens_h) * active
    head = (b * n_kv + hk) * capacity
    k_cache = KC + head * D
    v_cache = VC + head * DV
    cache_pos = CACHE_POS + head
    whole = n_live // BLOCK_N * BLOCK_N
    acc, acc_rest, m_i, l_i = _keys(
        acc, acc_rest, m_i, l_i, q, q_rest, k_cache, v_cache, D, DV, 0, whole, n_live, rows, q_pos, cache_pos, HIDDEN_PTR,
        scale, softcap, window, chunk, slope, D, DV, D0, D1, V0, V1, BLOCK_N, False, False, PRECISION,
        SOFTCAP, WINDOW, CHUNK, ALIBI, HIDDEN,
    )  # fmt: skip
    acc, acc_rest, m_i, l_i = _keys(
        acc, acc_rest, m_i, l_i, q, q_rest, k_cache, v_cache, D, DV, whole, n_live, n_live, rows, q_pos, cache_pos,
        HIDDEN_PTR, scale, softcap, window, chunk, slope, D, DV, D0, D1, V0, V1, BLOCK_N, False, True, PRECISION,
        SOFTCAP, WINDOW, CHUNK, ALIBI, HIDDEN,
    )  # fmt: skip

    # Positions ascend by at least 1 per token, so a token further back than window - 1 tokens is out of the window,
    # too.
    first = 0
    if WINDOW:
        first = tl.maximum(first, m0 - window + 1)
    if CHUNK:
        at = tl.load(POSITIONS + b * pos_b + m0).to(tl.int32)
        first = tl.maximum(first, m0 - at % chunk)
    diagonal = m0 // BLOCK_N * BLOCK_N * active
    first = tl.minimum(first // BLOCK_N * BLOCK_N, diagonal)
    end = tl.minimum(m0 + BLOCK_M, n_valid) * active
    k_new = K + b * k_b + hk * k_h
    v_new = V + b * v_b + hk * v_h
    new_pos = POSITIONS + b * pos_b
    hidden = HIDDEN_PTR + b * hidden_b + hk * hidden_h
    acc, acc_rest, m_i, l_i = _keys(
        acc, acc_rest, m_i, l_i, q, q_rest, k_new, v_new, k_t, v_t, first, diagonal, n_valid, rows, q_pos, new_pos, hidden,
        scale, softcap, window, chunk, slope, D, DV, D0, D1, V0, V1, BLOCK_N, True, False, PRECISION,
        SOFTCAP, WINDOW, CHUNK, ALIBI, HIDDEN,
    )  # fmt: skip
    acc, acc_rest, m_i, l_i = _keys(
        acc, acc_rest, m_i, l_i, q, q_rest, k_new, v_new, k_t, v_t, diagonal, end, n_valid, rows, q_pos, new_pos, hidden,
        scale, softcap, window, chunk, slope, D, DV, D0, D1, V0, V1, BLOCK_N, True, True, PRECISION,
        SOFTCAP, WINDOW, CHUNK, ALIBI, HIDDEN,
    )  # fmt: skip

    if SINKS:
        sink = tl.load(SINK + h).to(tl.float32) * 1.4426950408889634
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        acc = acc * alpha[:, None]
        if V1 > 0:
            acc_rest = acc_rest * alpha[:, None]
        m_i = m_new
    valid = (rows < n_valid) & (l_i > 0.0)
    inverse = 1.0 / tl.where(valid, l_i, 1.0)
    lse = tl.where(valid, (m_i + tl.log2(tl.where(valid, l_i, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + bh.to(tl.int64) * t + rows, lse, mask=inside)
    out_tile = OUT + (b * t + m0) * n_heads * DV + h * DV + in_tile[:, None] * (n_heads * DV)
    e0 = tl.arange(0, V0)
    out = tl.where(valid[:, None], acc * inverse[:, None], 0.0).to(OUT.dtype.element_ty)
    tl.store(out_tile + e0[None, :], out, mask=inside[:, None] & (e0 < DV)[None, :])
    if V1 > 0:
        e1 = V0 + tl.arange(0, V1)
        out_rest = tl.where(valid[:, None], acc_rest * inverse[:, None], 0.0).to(OUT.dtype.element_ty)
        tl.store(out_tile + e1[None, :], out_rest, mask=inside[:, None] & (e1 < DV)[None, :])


def strides_in_units(*tensors: Tensor) -> tuple[int, list[int]]:
    """A unit in elements, and the strides of the first three dims of each tensor counted in it.

    Triton looks at an integer for one thing: whether it is a multiple of 16. Strides that all are get the unit 1.
    Others are multiplied by their unit in the kernel, so that it knows how many bytes of a row it may copy at once.
    """
    # A stride of a dim of size 1 is never used, and may be anything.
    strides = [s if n > 1 else 0 for x in tensors for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    unit = math.gcd(16, *strides) % 16 or 1
    return unit, [s // unit for s in strides]


def _in_words(x: Tensor) -> bool:
    """Whether rows (B, heads, N, D) can be copied 4 bytes at a time, as Triton sees it."""
    step = max(1, 4 // x.element_size())
    used = (s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
    return x.data_ptr() % 16 == 0 and x.shape[3] % step == 0 and all(s % step == 0 for s in used)


def _padded(x: Tensor) -> Tensor:
    """A contiguous copy, with zeros after the last channel up to a multiple of 8."""
    return pad(x, (0, -x.shape[3] % 8)).clone(memory_format=torch.contiguous_format)


def portable(
    tokens: Tokens,
    slots: Slots,
    at: At,
    logits: Logits,
    config: Config | None = None,
    heads_at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The portable kernel; arguments and results as `chunk_attention` has them, already checked by it.

    Keys and values come into shared memory by asynchronous copies of 4 bytes or more, into buffers of their own. What
    can't be copied so, as rows of an odd number of channels, is copied and padded first. (Otherwise the two parts of a
    tile, which differ in layout, take turns in the same memory. There ptxas 12.8, which comes with Triton 3.6, loses
    the address of the second part: wrong results and illegal accesses on Hopper.)
    """
    (q, k, v), (k_cache, v_cache, lens, cache_pos), (positions, valid) = tokens, slots, at
    sinks, alibi, hidden, scale, softcap, window, chunk = logits
    b, h, t, d = q.shape
    hkv, capacity, dv = k_cache.shape[1], k_cache.shape[2], v.shape[3]
    if not all(_in_words(x) for x in (q, k, v, k_cache, v_cache)):
        wide = slots._replace(k_cache=_padded(k_cache), v_cache=_padded(v_cache))
        out, lse = portable(Tokens(*map(_padded, tokens)), wide, at, logits, config, heads_at_once)
        return out[..., :dv].transpose(1, 2).contiguous().transpose(1, 2), lse
    if config is None:
        config = portable_config(q.dtype, d, dv, t, features_in_use(logits))
    out = torch.empty(b, t, h, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    if b == 0 or t == 0:
        return out.transpose(1, 2), lse
    if heads_at_once is None:
        heads_at_once = heads_together(b * h, h // hkv, capacity + t, (d + dv) * q.element_size())
    blocks = triton.cdiv(t, config.block_m)
    (d0, d1), (v0, v1) = split_width(d), split_width(dv)
    unit, strides = strides_in_units(q, k, v)
    _chunk_attention[(blocks * b * h,)](
        q, k, v, k_cache, v_cache, lens, lens if cache_pos is None else cache_pos, positions, valid,
        lens if sinks is None else sinks, lens if alibi is None else alibi, lens if hidden is None else hidden, out, lse,
        float(scale), float(softcap), window, chunk,
        *strides, *lens.stride(), positions.stride(0), *((0, 0) if hidden is None else hidden.stride()[:2]),
        h, h // hkv, t, capacity, b * h, min(heads_at_once, b * h), blocks,
        D=d, DV=dv, D0=d0, D1=d1, V0=v0, V1=v1, BLOCK_M=config.block_m, BLOCK_N=config.block_n, UNIT=unit,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SINKS=sinks is not None, SOFTCAP=bool(softcap), WINDOW=bool(window), CHUNK=bool(chunk), ALIBI=alibi is not None,
        HIDDEN=hidden is not None, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out.transpose(1, 2), lse


# ------------------------------------------------------------------------------------------------ cuDNN
def merged_sdpa(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """cuDNN's attention on the cache, all of it live, and on the new tokens, causal, merged by their LSE.

    Every row of the batch must be real, with nothing hidden and no other option. The first call with a new shape builds
    a plan, which takes tenths of a second. Returns out (B, H, T, Dv) and lse (B, H, T) fp32.
    """
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    own, own_lse = attend(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    own_lse = own_lse.reshape(q.shape[:3])
    if k_cache.shape[2] == 0:
        return own, own_lse
    old, old_lse = attend(q, k_cache, v_cache, None, True, 0.0, False, scale=scale)[:2]
    return merge(own, own_lse, old, old_lse.reshape(q.shape[:3]))


@triton.jit
def _merge(A, A_LSE, B, B_LSE, OUT, LSE, a_b, a_h, a_t, b_b, b_h, b_t, n_heads, t, DV: tl.constexpr, BLOCK: tl.constexpr,
           ROWS: tl.constexpr):  # fmt: skip
    """Two attention outputs (B, H, T, DV) over different keys into one, (B, T, H, DV); ROWS tokens of one head a
    program."""
    bh = tl.program_id(1)
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < t
    at = bh.to(tl.int64) * t + rows
    a_lse = tl.load(A_LSE + at, mask=inside, other=0.0)
    b_lse = tl.load(B_LSE + at, mask=inside, other=0.0)
    top = tl.maximum(a_lse, b_lse)
    a_part = tl.exp(a_lse - top)
    b_part = tl.exp(b_lse - top)
    both = a_part + b_part
    tl.store(LSE + at, top + tl.log(both), mask=inside)
    cols = tl.arange(0, BLOCK)
    mask = inside[:, None] & (cols < DV)[None, :]
    x = tl.load(A + b * a_b + h * a_h + rows[:, None] * a_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(B + b * b_b + h * b_h + rows[:, None] * b_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    out = x * (a_part / both)[:, None] + y * (b_part / both)[:, None]
    tl.store(
        OUT + ((b * t + rows[:, None]) * n_heads + h) * DV + cols[None, :], out.to(OUT.dtype.element_ty), mask=mask
    )


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each: outputs (B, H, T, Dv), last
    dimension contiguous, and contiguous LSE (B, H, T) fp32, of which one of each pair must be finite."""
    batch, heads, t, dv = a.shape
    out = torch.empty(batch, t, heads, dv, dtype=a.dtype, device=a.device)
    lse = torch.empty_like(a_lse)
    _merge[(triton.cdiv(t, 32), batch * heads)](
        a, a_lse, b, b_lse, out, lse, *a.stride()[:3], *b.stride()[:3], heads, t,
        DV=dv, BLOCK=triton.next_power_of_2(dv), ROWS=32, num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2), lse


# ------------------------------------------------------------------------------------------------ the route
def choose_route(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    d: int,
    dv: int,
    features: tuple[str, ...] = (),
    *,
    aligned: bool = True,
) -> str:
    """ "hopper" or "triton", by the device's compute capability (None: not a CUDA device), the dtype, the head dimensions of
    keys and values and the options in use (as `features_in_use` names them). aligned: TMA can read the tensors."""
    return "triton" if _why_not_hopper(capability, dtype, d, dv, features) or not aligned else "hopper"


def features_in_use(logits: Logits) -> tuple[str, ...]:
    """The options that only the portable kernel has, by name."""
    named = {name: getattr(logits, name) for name in ("alibi", "hidden", "softcap", "window", "chunk")}
    return tuple(name for name, value in named.items() if isinstance(value, Tensor) or value)


def _why_not_hopper(
    capability: tuple[int, int] | None, dtype: torch.dtype, d: int, dv: int, features: tuple[str, ...]
) -> str | None:
    """The reason why the warp-specialized kernel can't compute such a call, or None."""
    if capability is None or capability[0] != 9:
        return f"compute capability {capability} (it needs 9.0)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype} (it has bfloat16 and float16)"
    if d != dv or d not in HOPPER_DIMS:
        return f"head dimensions {d} and {dv} (it has {HOPPER_DIMS}, equal for keys and values)"
    return ", ".join(features) or None


def _why_not_aligned(*tensors: Tensor) -> str | None:
    """TMA reads rows that start at multiples of 16 bytes: which of the tensors (B, heads, N, D) has others, or None."""
    for x in tensors:
        step = 16 // x.element_size()
        # A stride of a dimension of size 1 is never used, and is then whatever it was.
        if x.data_ptr() % 16 or any(s % step for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1):
            return f"a tensor of shape {tuple(x.shape)} and strides {x.stride()}: it needs rows aligned to 16 bytes"
    return None


def _why_not_cudnn(q: Tensor, sinks: Tensor | None, features: tuple[str, ...], full: bool) -> str | None:
    """The reason why two calls of cuDNN can't compute such a call, or None."""
    if not q.is_cuda:
        return "tensors that are not on a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype} (it has bfloat16 and float16)"
    if sinks is not None or features:
        return ", ".join((("sinks",) if sinks is not None else ()) + features)
    if not full:
        return (
            "caches that may be partly empty (it needs every slot live and every new token real; say full=True if so)"
        )
    return None


def _check(tokens: Tokens, slots: Slots, at: At, logits: Logits) -> None:
    """Raises ValueError where shapes, dtypes or layouts are not what `chunk_attention` says."""
    (q, k, v), (k_cache, v_cache, lens, cache_pos), (positions, valid) = tokens, slots, at
    hidden = logits.hidden
    b, h, t, d = q.shape
    hkv, capacity, dv = k_cache.shape[1], k_cache.shape[2], v.shape[3]
    expected = {
        "k": (k, (b, hkv, t, d)),
        "v": (v, (b, hkv, t, dv)),
        "k_cache": (k_cache, (b, hkv, capacity, d)),
        "v_cache": (v_cache, (b, hkv, capacity, dv)),
        "lens": (lens, (b, hkv)),
        "positions": (positions, (b, t)),
        "valid": (valid, (b,)),
    }
    if cache_pos is not None:
        expected["cache_pos"] = (cache_pos, (b, hkv, capacity))
    if hidden is not None:
        expected["hidden"] = (hidden, (b, hkv, t))
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape} for q of shape {tuple(q.shape)}")
    if h % hkv:
        raise ValueError(f"{h} query heads are not a multiple of {hkv} kv heads")
    if why := why_not(d, dv, h // hkv, 2, False, 8 * q.itemsize):
        raise ValueError(f"chunk_attention: {why}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype {q.dtype}; these kernels have bfloat16, float16 and float32")
    for name in ("k", "v", "k_cache", "v_cache"):
        if expected[name][0].dtype != q.dtype:
            raise ValueError(f"{name} is {expected[name][0].dtype}, q is {q.dtype}: convert one of them first")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and (cache_pos is None or cache_pos.is_contiguous())):
        raise ValueError("k_cache, v_cache and cache_pos must be contiguous")
    strides = (q.stride(3), k.stride(3), v.stride(3), positions.stride(1), 1 if hidden is None else hidden.stride(2))
    if any(s != 1 for s, n in zip(strides, (d, d, dv, t, t), strict=True) if n > 1):
        raise ValueError("q, k, v, positions and hidden must be contiguous in their last dimension")
    if valid.stride(0) != 1 and b > 1:
        raise ValueError("valid must be contiguous")
    if logits.placed and cache_pos is None and capacity:
        raise ValueError("window, chunk and alibi need cache_pos, the positions of the cached slots")


def chunk_attention(
    tokens: Tokens, slots: Slots, at: At, logits: Logits, route: str = "auto", full: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens on the live cache slots and on the new tokens up to themselves.

    q, k, v are contiguous in their last dimension only. What slots hold that are not live is never used; live ones may
    lie in any order; without cache_pos every query sees every live slot. positions ascend over the real tokens; scale >
    0. q, k, v and the slots are all bf16, fp16 or fp32.

    route: "auto", "hopper", "triton" or "cudnn"; full: the caller knows that all slots are live and all tokens real,
    which "cudnn" needs. A route that can't compute the call raises ValueError with the reason.

    Returns out (B, H, T, Dv) in q's dtype, a view of a contiguous (B, T, H, Dv), and the natural log-sum-exp (B, H, T)
    fp32. A row that sees nothing gets 0 and -inf; so do the rows from valid[b] on (from "cudnn" there are none).
    """
    q, k, v = tokens
    features = features_in_use(logits)
    _check(tokens, slots, at, logits)
    if route not in ROUTES:
        raise ValueError(f"route {route!r}; expected one of {ROUTES}")
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if route == "cudnn":
            if reason := _why_not_cudnn(q, logits.sinks, features, full):
                raise ValueError(f"route 'cudnn' can't have {reason}")
            return merged_sdpa(q, k, v, slots.k_cache, slots.v_cache, scale=logits.scale)
        if route != "triton":
            capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
            reason = _why_not_hopper(capability, q.dtype, q.shape[3], v.shape[3], features)
            reason = reason or _why_not_aligned(*tokens, slots.k_cache, slots.v_cache)
            if reason is None:
                from kvrewrite.kernels.attention import chunk_hopper  # Gluon is loaded where it is used

                return chunk_hopper.launch(tokens, slots, at.valid, logits.sinks, logits.scale)
            if route == "hopper":
                raise ValueError(f"route 'hopper' can't have {reason}")
        return portable(tokens, slots, at, logits)
