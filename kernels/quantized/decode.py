"""Attention of one new token per row on a paged cache whose older slots are quantized
(`kernels/quantized/reference.py`).

Work is cut and put together as in `decode.py`. Codes are never turned back into keys and values: what scales a channel
of a group of keys is multiplied into the query, once a group; what scales a group of channels of a value into the
softmax weights. What is added to codes gives one number a query head and group of keys, and a sum beside the weighted
values. Codes are centered first, so that rounding a scaled query to 8 bits loses no more than rounding the keys would.

A tensor core takes 16 rows, and a group of query heads is 4 to 8, as a rule. So a row is a query head and a group of a
value's channels, with the scales of that group: one product does for all of them, and each row gives the channels of
its group. Codes come from shared memory as operands (`codes.py`), and a worker is one warp or two: nothing waits.

After the quantized slots of its part a worker does those in full precision, as far as they are in its part.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.attention.decode import (
    PAGE,
    Config,
    combine_kernel,
    first_page,
    live_slots,
    logit,
    mass_kernel,
    multiprocessors,
    tile,
    worker_count,
)
from kvrewrite.kernels.groups import At, Codes, Logits, QuantizedPages, Tokens
from kvrewrite.kernels.launch import begin, options
from kvrewrite.kernels.quantized.codes import K_REST, K_UP, V_REST, V_UP, centered, scale_and_zero
from kvrewrite.kernels.quantized.scheme import Scheme
from kvrewrite.kernels.quantized.tiles import Tiles, tiles, why_not

_PAGE = tl.constexpr(PAGE)
_LOG2E = tl.constexpr(1.4426950408889634)


def config(scheme: Scheme, dtype: torch.dtype, shape: Tiles, dv: int, n_heads: int) -> Config:
    """How the attention kernel is launched for B * Hkv heads (`pages` 2: two groups of keys at a time; `overlap` means
    nothing here). One warp a worker, as long as it has the registers: then none waits for another.
    benchmarks/quantized_decode.py measures others."""
    if dtype == torch.float32:
        return Config(1, 8, 2)
    warps = min(8, max(1, shape.rows * triton.next_power_of_2(dv) // 2048))
    if warps == 1 and (scheme.kind == "int8" or n_heads <= 16):
        return Config(4, 2, 3, 1 if n_heads <= 16 else 2)
    return Config(8 // warps, warps, 3)


@triton.jit
def _times(x, N: tl.constexpr):
    """Rows (A, W), all of them N times: (N * A, W)."""
    return tl.reshape(tl.broadcast_to(x[None, :, :], [N, x.shape[0], x.shape[1]]), [N * x.shape[0], x.shape[1]])


@triton.jit
def _each(x, N: tl.constexpr):
    """Rows (A, W), each of them N times: (A * N, W)."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [x.shape[0], N, x.shape[1]]), [x.shape[0] * N, x.shape[1]])


@triton.jit
def _products(
    q, words, params, N: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, BYTES: tl.constexpr,
    KIND: tl.constexpr, DTYPE: tl.constexpr, MATH: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products of query heads with a group of keys: (N * heads, slots), the heads N times.

    q: for each part of a word its channels (heads, words); words (slots, words), WIDTH of them; params: pointer to the
    group's. What codes are counted from is one more number a query head.
    """
    d = tl.arange(0, words.shape[1])
    x = tl.zeros([N * q[0].shape[0], words.shape[0]], tl.float32)
    zero = tl.zeros([q[0].shape[0], words.shape[1]], tl.float32)
    turned = tl.trans(words)
    for part in tl.static_range(PARTS):
        if PARTS > BYTES:
            channel = d * BYTES + part // 2 + part % 2 * HALF
        else:
            channel = d * BYTES + part
        k_scale, k_zero = scale_and_zero(tl.load(params + channel, mask=d < WIDTH, other=0), KIND, DTYPE)
        mine = q[part].to(tl.float32)
        scaled = mine * k_scale[None, :]
        if KIND == "fp8":
            if FAST:
                scaled *= K_UP
        else:
            zero += mine * k_zero[None, :]
        codes = centered(turned, part, KIND, MATH, FAST)
        x = tl.dot(_times(scaled.to(MATH), N), codes, x, input_precision=PRECISION)
    if KIND != "fp8":
        x += _times(tl.sum(zero, 1)[:, None], N)
    elif FAST:
        x *= K_REST
    return x


@triton.jit
def _weigh(
    acc, zeros, weight, words, raw, HEADS: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
    DTYPE: tl.constexpr, MATH: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a group of values to acc, and what their codes are counted from to zeros.

    A row of acc, of zeros and of weight is a query head and a group of channels, whose scales it takes: of acc only
    those channels are used in the end. Products with the others are for free, as a tensor core takes 16 rows.
    raw: (groups, slots), parameters, 0 where a slot is not there.
    """
    acc0, acc1, acc2, acc3 = acc
    v_scale, v_zero = scale_and_zero(raw, KIND, DTYPE)
    if KIND == "fp8":
        if FAST:
            v_scale *= V_UP
    else:
        zeros += weight * _each(v_zero, HEADS)
    p = (weight * _each(v_scale, HEADS)).to(MATH)
    acc0 = tl.dot(p, centered(words, 0, KIND, MATH, FAST), acc0, input_precision=PRECISION)
    if PARTS > 1:
        acc1 = tl.dot(p, centered(words, 1, KIND, MATH, FAST), acc1, input_precision=PRECISION)
    if PARTS > 2:
        acc2 = tl.dot(p, centered(words, 2, KIND, MATH, FAST), acc2, input_precision=PRECISION)
        acc3 = tl.dot(p, centered(words, 3, KIND, MATH, FAST), acc3, input_precision=PRECISION)
    return (acc0, acc1, acc2, acc3), zeros


@triton.jit
def _side_by_side(x, y):
    """Channels of x and y (rows, words) in turn: (rows, 2 * words)."""
    return tl.reshape(tl.join(x, y), [x.shape[0], 2 * x.shape[1]])


@triton.jit
def _masked(x, here, pos_at, now, slope, window, chunk, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ALIBI: tl.constexpr):
    """Logits x (rows, slots) with ALiBi, -inf where a slot is not there or not seen. pos_at: pointers to positions."""
    seen = here
    if WINDOW or CHUNK or ALIBI:
        pos = tl.load(pos_at, mask=here, other=0)
        distance = now - pos
        if WINDOW:
            seen = seen & (distance < window)
        if CHUNK:
            seen = seen & (pos // chunk == now // chunk)
        if ALIBI:
            x -= slope[:, None] * distance.to(tl.float32)[None, :]
    return tl.where(seen[None, :], x, float("-inf"))


@triton.jit(
    do_not_specialize=[
        "n_heads",
        "width",
        "window",
        "chunk",
        "table_b",
        "table_h",
        "lens_b",
        "lens_h",
        "qlens_b",
        "pos_b",
    ]
)
def _attend_kernel(
    q, k_pages, v_pages, k_params, v_params, k_tail, v_tail, pos_pages, table, lens, qlens, positions, valid, alibi, logits,
    parts, scale, softcap, window, chunk, n_heads, width, logits_row,
    q_b, q_h, table_b, table_h, table_p, lens_b, lens_h, qlens_b, qlens_h, pos_b,
    HKV: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, KW: tl.constexpr,
    KWP: tl.constexpr, DV: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, VG: tl.constexpr, NG: tl.constexpr,
    NGP: tl.constexpr, ROW: tl.constexpr, BYTES: tl.constexpr, HALVES: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr,
    GROUPS: tl.constexpr, PAIR: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr, MATH: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ALIBI: tl.constexpr, MASS: tl.constexpr,
    IEEE: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A worker's part of the list of pages, for GS of a kv head's query heads; what it leaves in `parts` is what
    `decode._attend_kernel` leaves there.

    A key has KW words and a value VW, with a P at the end: the next power of two. A word has BYTES bytes. NG: groups of
    channels of a value, VG channels each; STEP: slots of a group of keys; GROUPS: groups of a page; PAIR: two of them
    at a time.
    """
    begin(PDL)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    DTYPE: tl.constexpr = k_tail.dtype.element_ty
    PARTS: tl.constexpr = BYTES * HALVES
    ROWS: tl.constexpr = NGP * GS
    AT_ONCE: tl.constexpr = 2 if PAIR else 1
    FEW: tl.constexpr = 16 if STEP == 16 else 32
    CLEAN: tl.constexpr = KIND == "fp8" and not FAST  # codes of slots that are not there may be NaN
    worker = tl.program_id(0)
    n_workers = tl.num_programs(0)
    offset = tl.program_id(1) * GS
    ids = tl.arange(0, HEADS)
    n_live = live_slots(lens, valid, ids, n_heads, HKV, lens_b, lens_h)[0]
    counts = (n_live + _PAGE - 1) // _PAGE
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    workers = tl.minimum(n_workers, total)
    lo = first_page(worker, total, workers)
    hi = first_page(worker + 1, total, workers)
    head = tl.sum((ends <= lo).to(tl.int32), 0)
    start = tl.max(tl.where(ends <= lo, ends, 0), 0)

    # A row is a group of a value's channels and a query head.
    row = tl.arange(0, ROWS)
    of_group = row // GS
    query = offset + row % GS
    ok = (query < G) & (of_group < NG)
    own = offset + tl.arange(0, GS)  # query heads, once
    group_v = tl.arange(0, NGP)
    slot = tl.arange(0, STEP)
    few = tl.arange(0, FEW)
    d = tl.arange(0, KWP)
    e = tl.arange(0, VWP)
    # Channels of the (first) half of a key and a value.
    d_all = tl.arange(0, BYTES * KWP)
    e_all = tl.arange(0, BYTES * VWP)
    in_query = (own < G)[:, None] & (d_all < BYTES * KW)[None, :]
    while lo < hi:
        b = head // HKV
        hk = head % HKV
        n = live_slots(lens, valid, head, n_heads, HKV, lens_b, lens_h)[0]
        nq = tl.minimum(tl.load(qlens + b * qlens_b + hk * qlens_h), n)
        n_pages = (n + _PAGE - 1) // _PAGE
        first = lo - start
        last = tl.minimum(hi - start, n_pages)
        pages = table + b.to(tl.int64) * table_b + hk * table_h
        q_at = q + b.to(tl.int64) * q_b + (hk * G + own)[:, None] * q_h + d_all[None, :]
        low = tl.load(q_at, mask=in_query, other=0.0)
        high = low
        if HALVES == 2:
            high = tl.load(q_at + D // 2, mask=in_query, other=0.0)
        if BYTES == 2:
            q0, q2 = tl.split(tl.reshape(low, [GS, KWP, 2]))
            q1, q3 = tl.split(tl.reshape(high, [GS, KWP, 2]))
            if HALVES == 1:
                q1 = q2
        else:
            q0, q1, q2, q3 = low, high, low, high
        queries = (q0, q1, q2, q3)
        now = 0
        if WINDOW or CHUNK or ALIBI:
            now = tl.load(positions + b * pos_b).to(tl.int32)
        slope = tl.zeros([ROWS], tl.float32)
        if ALIBI:
            slope = tl.load(alibi + hk * G + query, mask=ok, other=0.0).to(tl.float32) * _LOG2E
        left_logits = logits + (head * G + query).to(tl.int64)[:, None] * logits_row
        m = tl.full([ROWS], float("-inf"), tl.float32)
        # Sums over slots are made after the loop: for a sum all warps would wait for each other.
        weights = tl.zeros([ROWS, STEP], tl.float32)
        zeros = tl.zeros([ROWS, STEP], tl.float32)
        acc0 = tl.zeros([ROWS, VWP], tl.float32)
        acc1 = tl.zeros([ROWS, VWP], tl.float32) if PARTS > 1 else m
        acc2 = tl.zeros([ROWS, VWP], tl.float32) if PARTS > 2 else m
        acc3 = acc2

        # The quantized slots, a group of keys at a time, or two. A page is read whole.
        end = tl.minimum(last * _PAGE, nq)
        last_group = (end + STEP - 1) // STEP
        page = tl.load(pages + first * table_p, mask=first < last, other=0)
        for i in range(first * GROUPS, last_group, AT_ONCE):
            held = page.to(tl.int64)
            group = i % GROUPS
            # The next page's number is read a step ahead, so that its addresses are known in time.
            page = tl.load(pages + tl.minimum((i + AT_ONCE) // GROUPS, last - 1) * table_p)
            inside = group * STEP + slot
            here = slot < end - i * STEP
            pos_at = pos_pages + held * (2 * _PAGE) + inside * 2
            k_at = k_pages + held * (_PAGE * KW) + inside[:, None] * KW + d[None, :]
            words = tl.load(k_at, mask=(d < KW)[None, :] & (here[:, None] if CLEAN else True), other=0)
            ends_at = k_params + (held * GROUPS + group) * D
            x = _products(queries, words, ends_at, NGP, KW, D // 2, PARTS, BYTES, KIND, DTYPE, MATH, FAST, precision)
            x = logit(x, softcap, scale, SOFTCAP)
            x = _masked(x, here, pos_at, now, slope, window, chunk, WINDOW, CHUNK, ALIBI)
            if MASS:
                tl.store(
                    left_logits + (slot + i * STEP)[None, :], x, mask=(ok & (of_group == 0))[:, None] & here[None, :]
                )
            top = tl.max(x, 1)
            if PAIR:
                here_2 = slot < end - (i + 1) * STEP
                words = tl.load(
                    k_at + STEP * KW, mask=(d < KW)[None, :] & (here_2[:, None] if CLEAN else True), other=0
                )
                x_2 = _products(
                    queries, words, ends_at + D, NGP, KW, D // 2, PARTS, BYTES, KIND, DTYPE, MATH, FAST, precision
                )
                x_2 = logit(x_2, softcap, scale, SOFTCAP)
                x_2 = _masked(x_2, here_2, pos_at + 2 * STEP, now, slope, window, chunk, WINDOW, CHUNK, ALIBI)
                if MASS:
                    to = left_logits + (slot + (i + 1) * STEP)[None, :]
                    tl.store(to, x_2, mask=(ok & (of_group == 0))[:, None] & here_2[None, :])
                top = tl.maximum(top, tl.max(x_2, 1))
            top = tl.maximum(m, top)
            base = tl.where(top == float("-inf"), 0.0, top)
            alpha = tl.exp2(m - base)
            weight = tl.exp2(x - base[:, None])
            weights = weights * alpha[:, None] + weight
            acc0 = acc0 * alpha[:, None]
            if PARTS > 1:
                acc1 = acc1 * alpha[:, None]
            if PARTS > 2:
                acc2, acc3 = acc2 * alpha[:, None], acc3 * alpha[:, None]
            if KIND != "fp8":
                zeros = zeros * alpha[:, None]
            v_at = v_pages + held * (_PAGE * VW) + inside[:, None] * VW + e[None, :]
            raw_at = v_params + (held * _PAGE + inside[None, :]) * NG + group_v[:, None]
            words = tl.load(v_at, mask=(e < VW)[None, :] & (here[:, None] if CLEAN else True), other=0)
            raw = tl.load(raw_at, mask=(group_v < NG)[:, None] & here[None, :], other=0)
            acc = (acc0, acc1, acc2, acc3)
            acc, zeros = _weigh(acc, zeros, weight, words, raw, GS, PARTS, KIND, DTYPE, MATH, FAST, precision)
            if PAIR:
                weight = tl.exp2(x_2 - base[:, None])
                weights += weight
                words = tl.load(
                    v_at + STEP * VW, mask=(e < VW)[None, :] & (here_2[:, None] if CLEAN else True), other=0
                )
                raw = tl.load(raw_at + STEP * NG, mask=(group_v < NG)[:, None] & here_2[None, :], other=0)
                acc, zeros = _weigh(acc, zeros, weight, words, raw, GS, PARTS, KIND, DTYPE, MATH, FAST, precision)
            acc0, acc1, acc2, acc3 = acc
            m = top
        denom = tl.sum(weights, 1)
        low_v, high_v = acc0, acc1
        if BYTES == 2:
            low_v = _side_by_side(acc0, acc1 if HALVES == 1 else acc2)
            if HALVES == 2:
                high_v = _side_by_side(acc1, acc3)
        if KIND != "fp8":
            base_v = tl.sum(zeros, 1)[:, None]
            low_v += base_v
            if HALVES == 2:
                high_v += base_v
        elif FAST:
            low_v *= V_REST

        # Those in full precision, a few at a time.
        end = tl.minimum(last * _PAGE, n)
        tail_k = k_tail + head.to(tl.int64) * (TAIL * D)
        tail_v = v_tail + head.to(tl.int64) * (TAIL * DV)
        low_q = _times(low, NGP)
        high_q = _times(high, NGP) if HALVES == 2 else low_q
        for at in tl.range(tl.maximum(first * _PAGE, nq // FEW * FEW), end, FEW, num_stages=2):
            entry = at + few - nq
            here = (entry >= 0) & (few < end - at)
            k_at = tail_k + entry[:, None] * D + d_all[None, :]
            in_key = here[:, None] & (d_all < BYTES * KW)[None, :]
            x = tl.dot(low_q, tl.trans(tl.load(k_at, mask=in_key, other=0.0)), input_precision=precision)
            if HALVES == 2:
                keys = tl.load(k_at + D // 2, mask=in_key, other=0.0)
                x = tl.dot(high_q, tl.trans(keys), x, input_precision=precision)
            x = logit(x, softcap, scale, SOFTCAP)
            held = tl.load(pages + at // _PAGE * table_p).to(tl.int64)
            pos_at = pos_pages + held * (2 * _PAGE) + (at + few) % _PAGE * 2
            x = _masked(x, here, pos_at, now, slope, window, chunk, WINDOW, CHUNK, ALIBI)
            if MASS:
                to = left_logits + (few + at)[None, :]
                tl.store(to, x, mask=(ok & (of_group == 0))[:, None] & here[None, :])
            top = tl.maximum(m, tl.max(x, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            alpha = tl.exp2(m - base)
            weight = tl.exp2(x - base[:, None])
            denom = denom * alpha + tl.sum(weight, 1)
            v_at = tail_v + entry[:, None] * DV + e_all[None, :]
            in_value = here[:, None] & (e_all < BYTES * VW)[None, :]
            p = weight.to(DTYPE)
            values = tl.load(v_at, mask=in_value, other=0.0)
            low_v = tl.dot(p, values, low_v * alpha[:, None], input_precision=precision)
            if HALVES == 2:
                values = tl.load(v_at + DV // 2, mask=in_value, other=0.0)
                high_v = tl.dot(p, values, high_v * alpha[:, None], input_precision=precision)
            m = top

        lo = start + last
        left = parts + (worker + head).to(tl.int64) * (G2 * (2 + ROW))
        tl.store(left + query, m, mask=ok & (of_group == 0))
        tl.store(left + G2 + query, denom, mask=ok & (of_group == 0))
        to = left + 2 * G2 + query[:, None] * ROW + e_all[None, :]
        in_value = ok[:, None] & (e_all < BYTES * VW)[None, :]
        tl.store(to, low_v, mask=in_value & (of_group[:, None] == (e_all // VG)[None, :]))
        if HALVES == 2:
            mine = of_group[:, None] == ((e_all + DV // 2) // VG)[None, :]
            tl.store(to + DV // 2, high_v, mask=in_value & mine)
        start += n_pages
        head += 1


def paired(params: Tensor) -> Tensor:
    """Parameters with the two ends of a group in one integer, or as they are where there is one."""
    if params.shape[-1] == 1:
        return params.squeeze(-1)
    return params.view(torch.int64 if params.dtype == torch.float32 else torch.int32).squeeze(-1)


def check_pools(scheme: Scheme, dtype: torch.dtype, d: int, dv: int, codes: Codes) -> None:
    """Raises ValueError unless the pools and tails are those of heads of d and dv channels in dtype."""
    k_pages, v_pages, k_params, v_params, k_tail, v_tail = codes
    p = scheme.parameters
    expected = (
        ("k_pages", k_pages, (PAGE, scheme.code_width(d)), torch.uint8),
        ("v_pages", v_pages, (PAGE, scheme.code_width(dv)), torch.uint8),
        ("k_params", k_params, (PAGE // scheme.group, d, p), dtype),
        ("v_params", v_params, (PAGE, dv // scheme.value_group(dv), p), dtype),
        ("k_tail", k_tail, (k_tail.shape[1], k_tail.shape[2], d), dtype),
        ("v_tail", v_tail, (k_tail.shape[1], k_tail.shape[2], dv), dtype),
    )
    for name, x, shape, kind in expected:
        if tuple(x.shape[1:]) != shape or x.dtype != kind or not x.is_contiguous():
            how = "" if x.is_contiguous() else ", not contiguous"
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}{how}, expected (., {str(shape)[1:-1]}) {kind}")


def decode_attention_quantized(
    tokens: Tokens,
    codes: Codes,
    cache: QuantizedPages,
    at: At,
    logits: Logits,
    scheme: Scheme,
    mass: bool = False,
    launch: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`decode_attention` on a quantized cache.

    All is in q's dtype where it is not codes. Products with codes are of bf16 numbers (fp32 for fp32), summed in fp32:
    scales of keys and values need bf16's range, be the model in fp16 or not.

    Returns out (B, H, 1, Dv), the natural log-sum-exp (B, H, 1) fp32, and with `mass` what each slot and the new token
    received, (B, Hkv, C + 1) fp32. Rows without a new token get 0, -inf (or the sink) and 0.
    """
    (q, k, v), (positions, valid) = tokens, at
    k_pages, v_pages, k_params, v_params, k_tail, v_tail = codes
    pos_pages, table, lens, qlens = cache
    sinks, alibi, _, scale, softcap, window, chunk = logits
    b, h, _, d = q.shape
    hkv, dv = k.shape[1], v.shape[3]
    n_heads, width = b * hkv, table.shape[2]
    capacity = width * PAGE
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"decode_attention_quantized takes bf16, fp16 or fp32, got {q.dtype}")
    if q.shape[2] != 1 or h % hkv:
        raise ValueError(
            f"decode_attention_quantized takes one token per row and whole groups of heads, got q {tuple(q.shape)}"
        )
    if why := why_not(scheme, d, dv, h // hkv):
        raise ValueError(f"decode_attention_quantized: {why}")
    check_pools(scheme, q.dtype, d, dv, codes)
    group = h // hkv
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    found = torch.empty(b, hkv, capacity + 1, dtype=torch.float32, device=q.device) if mass else None
    if not n_heads:
        return out, lse, found
    shape = tiles(scheme, d, dv, group)
    c = config(scheme, q.dtype, shape, dv, n_heads) if launch is None else launch
    g2 = triton.next_power_of_2(group)
    key_width, value_width = (scheme.code_width(x) // shape.word for x in (d, dv))
    row = triton.next_power_of_2(dv)
    workers = worker_count(c.per_sm * multiprocessors(q.device), n_heads, max(width, 1), 1)
    parts = torch.empty((workers + n_heads) * g2 * (2 + row), dtype=torch.float32, device=q.device)
    logits_row = capacity + 16  # rows begin at multiples of 64 bytes
    scratch = torch.empty(b * h * logits_row, dtype=torch.float32, device=q.device) if mass else parts
    heads = 32 if n_heads <= 32 else max(256, triton.next_power_of_2(n_heads))
    valid = valid.contiguous()
    pdl = options(q.device)

    def words(pages: Tensor) -> Tensor:
        return pages.view(torch.int16) if shape.word == 2 else pages

    _attend_kernel[(workers, -(-group // shape.heads))](
        q, words(k_pages), words(v_pages), paired(k_params), paired(v_params), k_tail, v_tail, pos_pages, table, lens, qlens,
        positions, valid, q if alibi is None else alibi, scratch, parts, scale, softcap, window, chunk, n_heads, width,
        logits_row, q.stride(0), q.stride(1), table.stride(0), table.stride(1), table.stride(2), lens.stride(0),
        lens.stride(1), qlens.stride(0), qlens.stride(1), positions.stride(0),
        HKV=hkv, G=group, G2=g2, GS=shape.heads, D=d, KW=key_width, KWP=_padded(key_width), DV=dv, VW=value_width,
        VWP=_padded(value_width), VG=dv // shape.groups, NG=shape.groups, NGP=shape.rows // shape.heads, ROW=row,
        BYTES=shape.word, HALVES=shape.halves, TAIL=k_tail.shape[2], STEP=scheme.group, GROUPS=PAGE // scheme.group,
        PAIR=c.pages == 2 and scheme.group < PAGE, HEADS=heads, KIND=scheme.kind, MATH=_math(q.dtype),
        SOFTCAP=softcap != 0, WINDOW=window > 0, CHUNK=chunk > 0, ALIBI=alibi is not None, MASS=mass,
        IEEE=q.dtype == torch.float32, FAST=shape.word == 2 and _is_fast(q), num_warps=c.num_warps, num_stages=c.num_stages,
        maxnreg=c.registers, **pdl,
    )  # fmt: skip
    n_parts, piece = tile(workers, n_heads, group, dv)
    combine_kernel[(n_heads, group, -(-dv // piece))](
        q, k, v, parts, lens, valid, q if sinks is None else sinks, q, q, out, lse, scratch, scale, softcap,
        workers, n_heads, logits_row, capacity, 0, 0,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), lens.stride(0), lens.stride(1),
        HKV=hkv, G=group, G2=g2, D=d, DP=triton.next_power_of_2(d), DV=dv, ROW=row, HEADS=heads,
        SOFTCAP=softcap != 0, SINKS=sinks is not None, MASS=mass, PARTS=n_parts, SLICE=piece, HALF=0,
        num_warps=4, **pdl,
    )  # fmt: skip
    if found is not None:
        block = 1024
        mass_kernel[(math.ceil((capacity + 1) / block), n_heads)](
            scratch, lse, lens, valid, found, n_heads, logits_row, capacity, lens.stride(0), lens.stride(1),
            HKV=hkv, G=group, GB=min(g2, 4), BLOCK=block, num_warps=4, **pdl,
        )  # fmt: skip
    return out, lse, found


def _is_fast(q: Tensor) -> bool:
    """Whether codes become bf16 numbers by PTX that is written here, which takes a GPU with bf16 arithmetic."""
    if q.dtype == torch.float32 or not q.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(q.device) >= (9, 0)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _math(dtype: torch.dtype) -> tl.dtype:
    return tl.float32 if dtype == torch.float32 else tl.bfloat16
