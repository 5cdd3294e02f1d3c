"""Attention of one new token per row on a paged cache whose older slots are quantized
(`kernels/quantized/reference.py`).

Work is cut and put together as in `decode.py`. Codes are never turned back into keys and values: what scales a channel
of a group of keys is multiplied into the query, once a group; what scales a group of channels of a value into the
softmax weights. What is added to codes gives one number a query head and group of keys, and a sum that is kept beside
the weighted values. Codes are centered first, so that rounding a scaled query to 8 bits loses no more than rounding the
keys would.

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
from kvrewrite.kernels.quantized.scheme import FP8_MAX, Scheme
from kvrewrite.kernels.quantized.split import split, why_not

_PAGE = tl.constexpr(PAGE)
_LOG2E = tl.constexpr(1.4426950408889634)
_FP8_UNIT = tl.constexpr(1.0 / FP8_MAX)


def config(dtype: torch.dtype, d: int, dv: int) -> Config:
    """How the attention kernel is launched for a dtype and head dims (`pages` and `overlap` mean nothing here)."""
    if dtype == torch.float32 or d + dv > 256:
        return Config(1, 8, 3)
    return Config(4, 2, 3)


@triton.jit
def _scale_and_zero(raw, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What centered codes are multiplied by, and what is added then, fp32. raw: a group's two ends in one integer, or
    for fp8 its largest magnitude."""
    if KIND == "fp8":
        scale = raw.to(tl.float32) * _FP8_UNIT
        zero = scale * 0.0
    else:
        if raw.dtype == tl.int64:
            low = raw.to(tl.int32).to(tl.float32, bitcast=True)
            high = (raw >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        else:
            low = raw.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            high = (raw >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        unit: tl.constexpr = 1.0 / 15 if KIND == "int4" else 1.0 / 255
        middle: tl.constexpr = 8.0 if KIND == "int4" else 128.0
        scale = high * unit - low * unit
        zero = low + scale * middle
    return scale, zero


# Four codes of one register to four bf16 numbers in two. Bytes go to the low halves of 16 bits; there 0x43xx is 128 and
# more.
_INT8_TO_BF16 = tl.constexpr("""{
    .reg .b32 x<2>, a<2>, b<2>;
    prmt.b32 x0, $2, 0, 0x4140;
    prmt.b32 x1, $2, 0, 0x4342;
    lop3.b32 a0, x0, 0x007f007f, 0x43004300, 0xEA;
    lop3.b32 a1, x1, 0x007f007f, 0x43004300, 0xEA;
    lop3.b32 b0, x0, 0x00800080, 0x43804380, 0x6A;
    lop3.b32 b1, x1, 0x00800080, 0x43804380, 0x6A;
    sub.bf16x2 $0, a0, b0;
    sub.bf16x2 $1, a1, b1;
}""")
_INT4_TO_BF16 = tl.constexpr("""{
    .reg .b32 x<2>, a<2>, m;
    mov.b32 m, 0x43084308;
    prmt.b32 x0, $2, 0, 0x4140;
    prmt.b32 x1, $2, 0, 0x4342;
    lop3.b32 a0, x0, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 a1, x1, 0x000f000f, 0x43004300, 0xEA;
    sub.bf16x2 $0, a0, m;
    sub.bf16x2 $1, a1, m;
}""")
_UPPER_INT4_TO_BF16 = tl.constexpr("""{
    .reg .b32 x<2>, a<2>, m;
    mov.b32 m, 0x43084308;
    prmt.b32 x0, $2, 0, 0x4140;
    prmt.b32 x1, $2, 0, 0x4342;
    shr.u32 x0, x0, 4;
    shr.u32 x1, x1, 4;
    lop3.b32 a0, x0, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 a1, x1, 0x000f000f, 0x43004300, 0xEA;
    sub.bf16x2 $0, a0, m;
    sub.bf16x2 $1, a1, m;
}""")
# The exponent lies where bf16's does, but counts from another number: 2**120 makes up for that, for subnormal numbers,
# too.
_FP8_TO_BF16 = tl.constexpr("""{
    .reg .b32 x<2>, a<2>, m;
    mov.b32 m, 0x7B807B80;
    prmt.b32 x0, $2, 0, 0x1404;
    prmt.b32 x1, $2, 0, 0x3424;
    and.b32 a0, x0, 0x7f007f00;
    and.b32 a1, x1, 0x7f007f00;
    shr.u32 a0, a0, 4;
    shr.u32 a1, a1, 4;
    lop3.b32 a0, x0, 0x80008000, a0, 0xEA;
    lop3.b32 a1, x1, 0x80008000, a1, 0xEA;
    mul.bf16x2 $0, a0, m;
    mul.bf16x2 $1, a1, m;
}""")


@triton.jit
def _to_bf16(codes, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def _centered(codes, UPPER: tl.constexpr, KIND: tl.constexpr, MATH: tl.constexpr, FAST: tl.constexpr):
    """Codes as numbers: int8 -128 to 127, int4 -8 to 7 (of the lower or UPPER four bits), fp8 as they are. FAST: by
    hand, to bf16."""
    if FAST:
        if KIND == "fp8":
            x = _to_bf16(codes, _FP8_TO_BF16)
        elif KIND == "int8":
            x = _to_bf16(codes, _INT8_TO_BF16)
        elif UPPER:
            x = _to_bf16(codes, _UPPER_INT4_TO_BF16)
        else:
            x = _to_bf16(codes, _INT4_TO_BF16)
    else:
        if KIND == "fp8":
            x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        elif KIND == "int8":
            x = (codes ^ 0x80).to(tl.int8, bitcast=True)
        elif UPPER:
            x = (codes >> 4).to(tl.int8, bitcast=True) - 8
        else:
            x = (codes & 15).to(tl.int8, bitcast=True) - 8
    return x.to(MATH)


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
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, KW: tl.constexpr,
    KWP: tl.constexpr, DV: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, NV: tl.constexpr, NVP: tl.constexpr,
    VG: tl.constexpr, ROW: tl.constexpr, HALVES: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr,
    HEADS: tl.constexpr, KIND: tl.constexpr, MATH: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, ALIBI: tl.constexpr, MASS: tl.constexpr, IEEE: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A worker's part of the list of pages; what it leaves in `parts` is what `decode._attend_kernel` leaves there.

    A key is HALVES times KW channels, a value HALVES times NV parts of VW, with a P at the end: the next power of two.
    STEP: slots of a group of keys; GROUPS: groups of a page.
    """
    begin(PDL)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    DTYPE: tl.constexpr = k_tail.dtype.element_ty
    HALF_V: tl.constexpr = NV * VW
    worker = tl.program_id(0)
    n_workers = tl.num_programs(0)
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

    row = tl.arange(0, GP)
    ok = row < G
    slot = tl.arange(0, STEP)
    whole = tl.arange(0, _PAGE)
    d = tl.arange(0, KWP)
    part = tl.arange(0, NVP)
    e = tl.arange(0, VWP)
    # Channels of a value's (first) half and the numbers of their parameters; (NVP, 1, VWP) and (NVP, 1, 1).
    channel = part[:, None, None] * VW + e[None, None, :]
    in_value = (part < NV)[:, None, None] & (e < VW)[None, None, :]
    scaled = (part * VW)[:, None, None]
    while lo < hi:
        b = head // HKV
        hk = head % HKV
        n = live_slots(lens, valid, head, n_heads, HKV, lens_b, lens_h)[0]
        nq = tl.minimum(tl.load(qlens + b * qlens_b + hk * qlens_h), n)
        n_pages = (n + _PAGE - 1) // _PAGE
        first = lo - start
        last = tl.minimum(hi - start, n_pages)
        pages = table + b.to(tl.int64) * table_b + hk * table_h
        at = q + b.to(tl.int64) * q_b + (hk * G + row)[:, None] * q_h + d[None, :]
        in_query = ok[:, None] & (d < KW)[None, :]
        qa = tl.load(at, mask=in_query, other=0.0).to(tl.float32)
        if HALVES == 2:
            qb = tl.load(at + KW, mask=in_query, other=0.0).to(tl.float32)
        if WINDOW or CHUNK or ALIBI:
            now = tl.load(positions + b * pos_b).to(tl.int32)
        if ALIBI:
            slope = tl.load(alibi + hk * G + row, mask=ok, other=0.0).to(tl.float32) * _LOG2E
        m = tl.full([GP], float("-inf"), tl.float32)
        # Sums over slots are made after the loop: for a sum all warps would wait for each other.
        weights = tl.zeros([GP, STEP], tl.float32)
        acc_a = tl.zeros([NVP, GP, VWP], tl.float32)
        zero_a = tl.zeros([NVP, GP, STEP], tl.float32)
        if HALVES == 2:
            acc_b = tl.zeros([NVP, GP, VWP], tl.float32)
            zero_b = tl.zeros([NVP, GP, STEP], tl.float32)

        # The quantized slots, a group of keys at a time.
        end = tl.minimum(last * _PAGE, nq)
        last_group = (end + STEP - 1) // STEP
        page = tl.load(pages + first * table_p, mask=first < last, other=0)
        for i in range(first * GROUPS, last_group):
            held = page.to(tl.int64)
            group = i % GROUPS
            # The next page's number is read a step ahead, so that its addresses are known in time.
            page = tl.load(pages + tl.minimum((i + 1) // GROUPS, last - 1) * table_p)
            inside = group * STEP + slot
            here = slot < end - i * STEP
            k_at = k_pages + held * (_PAGE * KW) + inside[:, None] * KW + d[None, :]
            codes = tl.load(k_at, mask=here[:, None] & (d < KW)[None, :], other=0)
            ends_at = k_params + (held * GROUPS + group) * D + d
            k_scale, k_zero = _scale_and_zero(tl.load(ends_at, mask=d < KW, other=0), KIND, DTYPE)
            x = tl.dot(
                (qa * k_scale[None, :]).to(MATH),
                tl.trans(_centered(codes, False, KIND, MATH, FAST)),
                input_precision=precision,
            )
            if HALVES == 2:
                k_scale_b, k_zero_b = _scale_and_zero(tl.load(ends_at + KW, mask=d < KW, other=0), KIND, DTYPE)
                high = tl.trans(_centered(codes, True, KIND, MATH, FAST))
                x = tl.dot((qb * k_scale_b[None, :]).to(MATH), high, x, input_precision=precision)
                x += tl.sum(qa * k_zero[None, :] + qb * k_zero_b[None, :], 1)[:, None]
            elif KIND != "fp8":
                x += tl.sum(qa * k_zero[None, :], 1)[:, None]
            x = logit(x, softcap, scale, SOFTCAP)
            seen = here
            if WINDOW or CHUNK or ALIBI:
                pos = tl.load(pos_pages + held * (2 * _PAGE) + inside * 2, mask=here, other=0)
                distance = now - pos
                if WINDOW:
                    seen = seen & (distance < window)
                if CHUNK:
                    seen = seen & (pos // chunk == now // chunk)
                if ALIBI:
                    x -= slope[:, None] * distance.to(tl.float32)[None, :]
            x = tl.where(seen[None, :], x, float("-inf"))
            if MASS:
                to = logits + (head * G + row).to(tl.int64)[:, None] * logits_row + (slot + i * STEP)[None, :]
                tl.store(to, x, mask=ok[:, None] & here[None, :])
            top = tl.maximum(m, tl.max(x, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            alpha = tl.exp2(m - base)
            weight = tl.exp2(x - base[:, None])
            weights = weights * alpha[:, None] + weight
            v_at = v_pages + held * (_PAGE * HALF_V) + inside[None, :, None] * HALF_V + channel
            codes_v = tl.load(v_at, mask=in_value & here[None, :, None], other=0)
            ends_v = v_params + (held * _PAGE + inside[None, None, :]) * (DV // VG)
            in_ends = (part < NV)[:, None, None] & here[None, None, :]
            v_scale, v_zero = _scale_and_zero(tl.load(ends_v + scaled // VG, mask=in_ends, other=0), KIND, DTYPE)
            p = (weight[None, :, :] * v_scale).to(MATH)
            acc_a = tl.dot(
                p, _centered(codes_v, False, KIND, MATH, FAST), acc_a * alpha[None, :, None], input_precision=precision
            )
            if KIND != "fp8":
                zero_a = zero_a * alpha[None, :, None] + weight[None, :, :] * v_zero
            if HALVES == 2:
                raw = tl.load(ends_v + (scaled + HALF_V) // VG, mask=in_ends, other=0)
                v_scale_b, v_zero_b = _scale_and_zero(raw, KIND, DTYPE)
                p_b = (weight[None, :, :] * v_scale_b).to(MATH)
                high_v = _centered(codes_v, True, KIND, MATH, FAST)
                acc_b = tl.dot(p_b, high_v, acc_b * alpha[None, :, None], input_precision=precision)
                zero_b = zero_b * alpha[None, :, None] + weight[None, :, :] * v_zero_b
            m = top
        denom = tl.sum(weights, 1)
        if KIND != "fp8":
            acc_a += tl.sum(zero_a, 2)[:, :, None]
        if HALVES == 2:
            acc_b += tl.sum(zero_b, 2)[:, :, None]

        # Those in full precision, a page of slots at a time.
        end = tl.minimum(last * _PAGE, n)
        tail_k = k_tail + head.to(tl.int64) * (TAIL * D)
        tail_v = v_tail + head.to(tl.int64) * (TAIL * DV)
        for i in tl.range(tl.maximum(first, nq // _PAGE), last, num_stages=2):
            entry = i * _PAGE + whole - nq
            here = (entry >= 0) & (whole < end - i * _PAGE)
            k_at = tail_k + entry[:, None] * D + d[None, :]
            in_key = here[:, None] & (d < KW)[None, :]
            keys = tl.load(k_at, mask=in_key, other=0.0)
            x = tl.dot(qa.to(DTYPE), tl.trans(keys), input_precision=precision)
            if HALVES == 2:
                keys = tl.load(k_at + KW, mask=in_key, other=0.0)
                x = tl.dot(qb.to(DTYPE), tl.trans(keys), x, input_precision=precision)
            x = logit(x, softcap, scale, SOFTCAP)
            seen = here
            if WINDOW or CHUNK or ALIBI:
                held = tl.load(pages + i * table_p).to(tl.int64)
                pos = tl.load(pos_pages + held * (2 * _PAGE) + whole * 2, mask=here, other=0)
                distance = now - pos
                if WINDOW:
                    seen = seen & (distance < window)
                if CHUNK:
                    seen = seen & (pos // chunk == now // chunk)
                if ALIBI:
                    x -= slope[:, None] * distance.to(tl.float32)[None, :]
            x = tl.where(seen[None, :], x, float("-inf"))
            if MASS:
                to = logits + (head * G + row).to(tl.int64)[:, None] * logits_row + (whole + i * _PAGE)[None, :]
                tl.store(to, x, mask=ok[:, None] & here[None, :])
            top = tl.maximum(m, tl.max(x, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            alpha = tl.exp2(m - base)
            weight = tl.exp2(x - base[:, None])
            denom = denom * alpha + tl.sum(weight, 1)
            v_at = tail_v + entry[None, :, None] * DV + channel
            in_values = in_value & here[None, :, None]
            values = tl.load(v_at, mask=in_values, other=0.0)
            p = tl.broadcast_to(weight.to(DTYPE)[None, :, :], [NVP, GP, _PAGE])
            acc_a = tl.dot(p, values, acc_a * alpha[None, :, None], input_precision=precision)
            if HALVES == 2:
                values = tl.load(v_at + HALF_V, mask=in_values, other=0.0)
                acc_b = tl.dot(p, values, acc_b * alpha[None, :, None], input_precision=precision)
            m = top

        lo = start + last
        left = parts + (worker + head).to(tl.int64) * (G2 * (2 + ROW))
        tl.store(left + row, m, mask=ok)
        tl.store(left + G2 + row, denom, mask=ok)
        to = left + 2 * G2 + row[None, :, None] * ROW + channel
        tl.store(to, acc_a, mask=ok[None, :, None] & in_value)
        if HALVES == 2:
            tl.store(to + HALF_V, acc_b, mask=ok[None, :, None] & in_value)
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
    c = config(q.dtype, d, dv) if launch is None else launch
    values, g2 = split(scheme, dv), triton.next_power_of_2(group)
    key_width = scheme.code_width(d)
    row = triton.next_power_of_2(dv)
    workers = worker_count(c.per_sm * multiprocessors(q.device), n_heads, max(width, 1), 1)
    parts = torch.empty((workers + n_heads) * g2 * (2 + row), dtype=torch.float32, device=q.device)
    logits_row = capacity + 16  # rows begin at multiples of 64 bytes
    scratch = torch.empty(b * h * logits_row, dtype=torch.float32, device=q.device) if mass else parts
    heads = 32 if n_heads <= 32 else max(256, triton.next_power_of_2(n_heads))
    valid = valid.contiguous()
    pdl = options(q.device)
    _attend_kernel[(workers,)](
        q, k_pages, v_pages, paired(k_params), paired(v_params), k_tail, v_tail, pos_pages, table, lens, qlens, positions,
        valid, q if alibi is None else alibi, scratch, parts, scale, softcap, window, chunk, n_heads, width, logits_row,
        q.stride(0), q.stride(1), table.stride(0), table.stride(1), table.stride(2), lens.stride(0), lens.stride(1),
        qlens.stride(0), qlens.stride(1), positions.stride(0),
        HKV=hkv, G=group, GP=max(16, g2), G2=g2, D=d, KW=key_width, KWP=max(16, triton.next_power_of_2(key_width)), DV=dv,
        VW=values.width, VWP=max(16, triton.next_power_of_2(values.width)), NV=values.parts,
        NVP=triton.next_power_of_2(values.parts), VG=scheme.value_group(dv), ROW=row, HALVES=values.halves,
        TAIL=k_tail.shape[2], STEP=scheme.group, GROUPS=PAGE // scheme.group, HEADS=heads, KIND=scheme.kind, MATH=_math(q.dtype),
        SOFTCAP=softcap != 0, WINDOW=window > 0, CHUNK=chunk > 0, ALIBI=alibi is not None, MASS=mass,
        IEEE=q.dtype == torch.float32, FAST=_is_fast(q), num_warps=c.num_warps, num_stages=c.num_stages,
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


def _math(dtype: torch.dtype) -> tl.dtype:
    return tl.float32 if dtype == torch.float32 else tl.bfloat16
