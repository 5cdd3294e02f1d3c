"""Attention of one new token a row on a paged cache: what decoding does at every step.

The pages of all heads lie one behind the other in one list, and each of a fixed number of workers takes an equal,
contiguous part of it, across heads where need be ("stream-K"). So the time goes by the sum of the heads' lengths, not
by the longest, and the launch grid depends on shapes only. A worker that has all of a head writes the result; of a head
with several workers each leaves its part of the softmax (maximum, sum, weighted values), and either the last of them to
arrive puts them together, always in the order of the pages, or a second kernel does.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PAGE = 64  # slots a page
LOG2E = 1.4426950408889634
_PAGE = tl.constexpr(PAGE)
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(0.6931471805599453)


class Config(NamedTuple):
    """How the attention kernel is launched."""

    per_sm: int  # workers for each multiprocessor
    num_warps: int
    num_stages: int  # one more than the pages whose loads are under way at a time
    one_launch: bool = True  # the last worker of a head combines, if the caller brought tickets; else a second kernel
    overlap: bool = False  # the second kernel starts while the first one runs (programmatic dependent launch)

    @property
    def registers(self) -> int | None:
        """Registers a thread, so that `per_sm` workers are there at the same time; None: any number will do."""
        limit = 65536 // (self.per_sm * self.num_warps * 32) // 8 * 8
        return limit if limit < 255 else None


def config(dtype: torch.dtype, d: int, dv: int, group: int) -> Config:
    """The configuration for a dtype, head dims and query heads a kv head: as many workers as a multiprocessor's memory
    (227 KB) has room for."""
    page_bytes = PAGE * (d + dv) * dtype.itemsize
    if page_bytes > 64 << 10:
        return Config(1, 8, 2)
    if page_bytes > 40 << 10 or group > 16:
        return Config(1, 8, 3)
    if page_bytes > 32 << 10:
        return Config(2, 4, 3)
    if page_bytes > 16 << 10:
        return Config(3, 4, 3)
    return Config(4, 4, 4)


@triton.jit
def _live(lens, valid, head, n_heads, HKV: tl.constexpr, lens_b, lens_h):
    """Cached slots that a head attends to (none in rows without a new token), and whether its row has one."""
    b = head // HKV
    there = head < n_heads
    real = tl.load(valid + b, mask=there, other=0) > 0
    n = tl.load(lens + b * lens_b + (head % HKV) * lens_h, mask=there, other=0)
    return tl.where(real, n, 0), real


@triton.jit
def _share(worker, per, extra):
    """The first page of a worker's part of the list."""
    return worker * per + tl.minimum(worker, extra)


@triton.jit
def _worker_of(page, per, extra):
    """The worker whose part of the list a page is in."""
    large = extra * (per + 1)
    return tl.where(page < large, page // (per + 1), extra + (page - large) // tl.maximum(per, 1))


@triton.jit
def _logit(x, softcap, scale, SOFTCAP: tl.constexpr):
    """Logits in units of log 2 of dot products x, before ALiBi."""
    if SOFTCAP:
        x = x * scale / softcap
        # tanh as 1 - 2 / (1 + e^2x), which overflows to the right limits.
        return (softcap * _LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2E))))
    return x * (scale * _LOG2E)


@triton.jit
def _finish(
    m, denom, acc1, acc2, head, row, ok, sinks, out, lse,
    G: tl.constexpr, HKV: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Normalizes the rows of a head (the query heads `row` of its group) and stores them."""
    if SINKS:
        sink = tl.load(sinks + (head % HKV) * G + row, mask=ok, other=0.0).to(tl.float32) * _LOG2E
        top = tl.maximum(m, sink)
        alpha = tl.exp2(m - top)
        denom = denom * alpha + tl.exp2(sink - top)
        acc1 *= alpha[:, None]
        if DV2 > 0:
            acc2 *= alpha[:, None]
        m = top
    # A row that sees nothing (one without a new token) gives 0 and -inf.
    norm = tl.where(denom > 0, denom, 1.0)
    natural = tl.where(denom > 0, (m + tl.log2(norm)) * _LN2, float("-inf"))
    to = head * G + row
    tl.store(lse + to, natural, mask=ok)
    at = out + to.to(tl.int64)[:, None] * DV
    d1 = tl.arange(0, DV1)
    tl.store(at + d1[None, :], (acc1 / norm[:, None]).to(out.dtype.element_ty), mask=ok[:, None] & (d1 < DV)[None, :])
    if DV2 > 0:
        d2 = DV1 + tl.arange(0, DV2)
        tl.store(
            at + d2[None, :], (acc2 / norm[:, None]).to(out.dtype.element_ty), mask=ok[:, None] & (d2 < DV)[None, :]
        )


@triton.jit
def _sum_parts(
    parts, head, start, n_units, per, extra, g0, sinks, out, lse, n_workers,
    G: tl.constexpr, GB: tl.constexpr, G2: tl.constexpr, HKV: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr,
    DV2: tl.constexpr, SINKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Puts together what the workers of a head left, for query heads [g0, g0 + GB) of its group, PARTS workers at a time.

    parts holds one entry for every (kind, worker): the part that begins a head lies in the second half, others in the
    first, since a worker has at most one of each. An entry is G2 maxima, G2 sums, and G2 rows of weighted values.
    """
    first = _worker_of(start, per, extra)
    n_parts = _worker_of(start + n_units - 1, per, extra) - first + 1
    width: tl.constexpr = G2 * (2 + DV1 + DV2)
    row = g0 + tl.arange(0, GB)
    ok = row < G
    d1 = tl.arange(0, DV1)
    m = tl.full([GB], float("-inf"), tl.float32)
    denom = tl.zeros([GB], tl.float32)
    acc1 = tl.zeros([GB, DV1], tl.float32)
    acc2 = tl.zeros([GB, DV2 if DV2 > 0 else 1], tl.float32)
    for i in tl.range(0, n_parts, PARTS, num_stages=4):
        part = i + tl.arange(0, PARTS)
        entry = parts + (first + part + tl.where(part == 0, n_workers, 0)) * width
        here = part < n_parts
        both = here[:, None] & ok[None, :]
        ms = tl.load(entry[:, None] + row[None, :], mask=both, other=float("-inf"), cache_modifier=".cg")
        ls = tl.load(entry[:, None] + (G2 + row)[None, :], mask=both, other=0.0, cache_modifier=".cg")
        at = entry[:, None, None] + (2 * G2 + row * (DV1 + DV2))[None, :, None]
        a1 = tl.load(at + d1[None, None, :], mask=both[:, :, None], other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(ms, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        alpha = tl.exp2(m - base)
        weight = tl.exp2(ms - base[None, :])
        denom = denom * alpha + tl.sum(weight * ls, 0)
        acc1 = acc1 * alpha[:, None] + tl.sum(a1 * weight[:, :, None], 0)
        if DV2 > 0:
            d2 = DV1 + tl.arange(0, DV2)
            a2 = tl.load(at + d2[None, None, :], mask=both[:, :, None], other=0.0, cache_modifier=".cg")
            acc2 = acc2 * alpha[:, None] + tl.sum(a2 * weight[:, :, None], 0)
        m = top
    _finish(m, denom, acc1, acc2, head, row, ok, sinks, out, lse, G, HKV, DV, DV1, DV2, SINKS)


@triton.jit(do_not_specialize=["n_heads", "window", "chunk", "table_b", "table_h", "lens_b", "lens_h", "pos_b"])
def _attend_kernel(
    q, k, v, k_dense, v_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, sinks, alibi,
    out, lse, logits, parts, tickets,
    scale, softcap, window, chunk, n_heads, logits_row, capacity,
    q_b, q_h, k_b, k_h, v_b, v_h, kd_b, kd_h, kd_s, vd_b, vd_h, vd_s, table_b, table_h, table_p, lens_b, lens_h, pos_b,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, HEADS: tl.constexpr, K_DENSE: tl.constexpr,
    V_DENSE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, MASS: tl.constexpr, TICKETS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    worker = tl.program_id(0)
    n_workers = tl.num_programs(0)
    # The list of pages. A head without any counts as one page, so that somebody writes its result.
    n_live, _ = _live(lens, valid, tl.arange(0, HEADS), n_heads, HKV, lens_b, lens_h)
    units = tl.where(tl.arange(0, HEADS) < n_heads, tl.maximum((n_live + _PAGE - 1) // _PAGE, 1), 0)
    ends = tl.cumsum(units, 0)
    total = tl.sum(units, 0)
    per = total // n_workers
    extra = total % n_workers
    lo = _share(worker, per, extra)
    hi = _share(worker + 1, per, extra)
    head = tl.sum((ends <= lo).to(tl.int32), 0)
    start = tl.max(tl.where(ends <= lo, ends, 0), 0)

    row = tl.arange(0, GP)
    ok = row < G
    slot = tl.arange(0, _PAGE)
    d1 = tl.arange(0, D1)
    d2 = D1 + tl.arange(0, D2 if D2 > 0 else 1)
    e1 = tl.arange(0, DV1)
    e2 = DV1 + tl.arange(0, DV2 if DV2 > 0 else 1)
    while lo < hi:
        b = head // HKV
        hk = head % HKV
        n, real = _live(lens, valid, head, n_heads, HKV, lens_b, lens_h)
        n_pages = (n + _PAGE - 1) // _PAGE
        n_units = tl.maximum(n_pages, 1)
        first = lo - start
        last = tl.minimum(hi - start, n_units)
        pages = table + b.to(tl.int64) * table_b + hk * table_h
        page = tl.load(pages + first * table_p, mask=first < n_pages, other=0)

        at = q + b.to(tl.int64) * q_b + (hk * G + row)[:, None] * q_h
        q1 = tl.load(at + d1[None, :], mask=ok[:, None] & (d1 < D)[None, :], other=0.0)
        if D2 > 0:
            q2 = tl.load(at + d2[None, :], mask=ok[:, None] & (d2 < D)[None, :], other=0.0)
        if WINDOW or CHUNK or ALIBI:
            now = tl.load(positions + b * pos_b).to(tl.int32)
        if ALIBI:
            slope = tl.load(alibi + hk * G + row, mask=ok, other=0.0).to(tl.float32) * _LOG2E

        # Whoever begins a head has its new token, too, which is read now and added behind the loop.
        own = (first == 0) & real
        own_d = tl.where(own, D, 0)
        own_dv = tl.where(own, DV, 0)
        own_at = k + b.to(tl.int64) * k_b + hk * k_h
        own_k1 = tl.load(own_at + d1, mask=d1 < own_d, other=0.0)
        if D2 > 0:
            own_k2 = tl.load(own_at + d2, mask=d2 < own_d, other=0.0)
        own_at = v + b.to(tl.int64) * v_b + hk * v_h
        own_v1 = tl.load(own_at + e1, mask=e1 < own_dv, other=0.0)
        if DV2 > 0:
            own_v2 = tl.load(own_at + e2, mask=e2 < own_dv, other=0.0)

        m = tl.full([GP], float("-inf"), tl.float32)
        denom = tl.zeros([GP], tl.float32)
        acc1 = tl.zeros([GP, DV1], tl.float32)
        acc2 = tl.zeros([GP, DV2 if DV2 > 0 else 1], tl.float32)
        for p in range(first, tl.minimum(last, n_pages)):
            held = page.to(tl.int64)
            # The next page's number is read a step ahead, so that its keys' addresses are known in time.
            page = tl.load(pages + tl.minimum(p + 1, n_pages - 1) * table_p)
            here = slot < n - p * _PAGE
            if K_DENSE:
                k_at = k_dense + b.to(tl.int64) * kd_b + hk.to(tl.int64) * kd_h + tl.cast(p * _PAGE, tl.int64) * kd_s
                k_at = k_at + slot[:, None] * kd_s
            else:
                k_at = k_pages + held * (_PAGE * D) + slot[:, None] * D
            k1 = tl.load(k_at + d1[None, :], mask=here[:, None] & (d1 < D)[None, :], other=0.0)
            x = tl.dot(q1, tl.trans(k1.to(q1.dtype)), input_precision=precision)
            if D2 > 0:
                k2 = tl.load(k_at + d2[None, :], mask=here[:, None] & (d2 < D)[None, :], other=0.0)
                x = tl.dot(q2, tl.trans(k2.to(q1.dtype)), x, input_precision=precision)
            x = _logit(x, softcap, scale, SOFTCAP)
            seen = here
            if WINDOW or CHUNK or ALIBI:
                pos = tl.load(pos_pages + held * (2 * _PAGE) + slot * 2, mask=here, other=0)
                distance = now - pos
                if WINDOW:
                    seen = seen & (distance < window)
                if CHUNK:
                    seen = seen & (pos // chunk == now // chunk)
                if ALIBI:
                    x -= slope[:, None] * distance.to(tl.float32)[None, :]
            x = tl.where(seen[None, :], x, float("-inf"))
            if MASS:
                to = logits + (head * G + row).to(tl.int64)[:, None] * logits_row + (slot + p * _PAGE)[None, :]
                tl.store(to, x, mask=ok[:, None] & here[None, :])
            top = tl.maximum(m, tl.max(x, 1))
            if WINDOW or CHUNK:  # otherwise every page has a slot that is seen
                base = tl.where(top == float("-inf"), 0.0, top)
            else:
                base = top
            alpha = tl.exp2(m - base)
            weight = tl.exp2(x - base[:, None])
            denom = denom * alpha + tl.sum(weight, 1)
            if V_DENSE:
                v_at = v_dense + b.to(tl.int64) * vd_b + hk.to(tl.int64) * vd_h + tl.cast(p * _PAGE, tl.int64) * vd_s
                v_at = v_at + slot[:, None] * vd_s
            else:
                v_at = v_pages + held * (_PAGE * DV) + slot[:, None] * DV
            v1 = tl.load(v_at + e1[None, :], mask=here[:, None] & (e1 < DV)[None, :], other=0.0).to(q1.dtype)
            acc1 = tl.dot(weight.to(q1.dtype), v1, acc1 * alpha[:, None], input_precision=precision)
            if DV2 > 0:
                v2 = tl.load(v_at + e2[None, :], mask=here[:, None] & (e2 < DV)[None, :], other=0.0).to(q1.dtype)
                acc2 = tl.dot(weight.to(q1.dtype), v2, acc2 * alpha[:, None], input_precision=precision)
            m = top

        if own:
            x = tl.sum(q1.to(tl.float32) * own_k1.to(tl.float32)[None, :], 1)
            if D2 > 0:
                x += tl.sum(q2.to(tl.float32) * own_k2.to(tl.float32)[None, :], 1)
            x = _logit(x, softcap, scale, SOFTCAP)
            if MASS:
                tl.store(logits + (head * G + row).to(tl.int64) * logits_row + capacity, x, mask=ok)
            top = tl.maximum(m, x)
            alpha = tl.exp2(m - top)
            weight = tl.exp2(x - top)
            denom = denom * alpha + weight
            acc1 = acc1 * alpha[:, None] + weight[:, None] * own_v1.to(tl.float32)[None, :]
            if DV2 > 0:
                acc2 = acc2 * alpha[:, None] + weight[:, None] * own_v2.to(tl.float32)[None, :]
            m = top

        if (first == 0) & (last == n_units):
            _finish(m, denom, acc1, acc2, head, row, ok, sinks, out, lse, G, HKV, DV, DV1, DV2, SINKS)
        else:
            width: tl.constexpr = G2 * (2 + DV1 + DV2)
            entry = parts + (worker + tl.where(first == 0, n_workers, 0)) * width
            tl.store(entry + row, m, mask=ok)
            tl.store(entry + G2 + row, denom, mask=ok)
            to = entry + 2 * G2 + row[:, None] * (DV1 + DV2)
            tl.store(to + e1[None, :], acc1, mask=ok[:, None])
            if DV2 > 0:
                tl.store(to + e2[None, :], acc2, mask=ok[:, None])
            if TICKETS:
                n_parts = _worker_of(start + n_units - 1, per, extra) - _worker_of(start, per, extra) + 1
                tl.debug_barrier()  # all of this worker's part is written before its arrival is announced
                before = tl.atomic_add(tickets + head, 1, sem="acq_rel", scope="gpu")
                if before == n_parts - 1:
                    _sum_parts(
                        parts, head, start, n_units, per, extra, 0, sinks, out, lse, n_workers,
                        G, G2, G2, HKV, DV, DV1, DV2, SINKS, PARTS,
                    )  # fmt: skip
                    tl.store(tickets + head, 0)
        lo = start + last
        start += n_units
        head += 1


@triton.jit(do_not_specialize=["n_workers", "n_heads", "lens_b", "lens_h"])
def _combine_kernel(
    parts, lens, valid, sinks, out, lse, n_workers, n_heads, lens_b, lens_h,
    HKV: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    HEADS: tl.constexpr, SINKS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query head of a (row, kv head) whose pages several workers shared."""
    head = tl.program_id(0)
    ids = tl.arange(0, HEADS)
    n_live, _ = _live(lens, valid, ids, n_heads, HKV, lens_b, lens_h)
    units = tl.where(ids < n_heads, tl.maximum((n_live + _PAGE - 1) // _PAGE, 1), 0)
    start = tl.sum(tl.where(ids < head, units, 0), 0)
    n_units = tl.sum(tl.where(ids == head, units, 0), 0)
    total = tl.sum(units, 0)
    per = total // n_workers
    extra = total % n_workers
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if _worker_of(start, per, extra) != _worker_of(start + n_units - 1, per, extra):
        _sum_parts(
            parts, head, start, n_units, per, extra, tl.program_id(1), sinks, out, lse, n_workers,
            G, 1, G2, HKV, DV, DV1, DV2, SINKS, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_heads", "lens_b", "lens_h"])
def _mass_kernel(
    logits, lse, lens, valid, mass, n_heads, logits_row, capacity, lens_b, lens_h,
    HKV: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax weights from logits, summed over a group's query heads."""
    head = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, real = _live(lens, valid, head, n_heads, HKV, lens_b, lens_h)
    seen = (slot < n) | (slot == tl.where(real, capacity, -1))
    weight = tl.zeros([BLOCK], tl.float32)
    for g in range(G):
        of = (head * G + g).to(tl.int64)
        x = tl.load(logits + of * logits_row + slot, mask=seen, other=float("-inf"))
        norm = tl.load(lse + of, mask=real, other=0.0) * _LOG2E
        weight += tl.exp2(x - norm)
    tl.store(mass + head.to(tl.int64) * (capacity + 1) + slot, weight, mask=slot <= capacity)


def _parts_of(d: int) -> tuple[int, int]:
    """A head dim as two powers of two, the second as small as will do (0: none)."""
    first = max(16, 1 << (d.bit_length() - 1))
    return first, max(16, triton.next_power_of_2(d - first)) if d > first else 0


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_dense: Tensor | None,
    v_dense: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    positions: Tensor,
    valid: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    *,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    mass: bool = False,
    tickets: Tensor | None = None,
    launch: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`kvrewrite::cached_attention` for one new token a row.

    q: (B, H, 1, D), k: (B, Hkv, 1, D), v: (B, Hkv, 1, Dv), bf16, fp16 or fp32, last dim contiguous: the new tokens, of
    which row b has one if valid (B,) int32 is 1; they are not in the cache yet and are later than everything that is.
    Pools, table (B, Hkv, P) int32, lens (B, Hkv) int32 and positions (B, 1) int64 as in ops.py; k_dense (B, Hkv, C, D)
    and v_dense (B, Hkv, C, Dv) stand for the cached keys or values where given. sinks, alibi: (H,) or None.

    Returns out (B, H, 1, Dv) in q's dtype, the natural log-sum-exp (B, H, 1) fp32, and with `mass` what each slot and the
    new token received, (B, Hkv, C + 1) fp32, summed over the group's query heads (None without). Rows without a new
    token get 0, -inf (or the sink) and 0.

    tickets: at least B * Hkv int32 zeros, which are zeros again afterwards; with them everything is one launch (two
    with `mass`), without them one more. Launches that may run at the same time need different ones.
    """
    b, h, _, d = q.shape
    hkv, dv = k.shape[1], v.shape[3]
    n_heads, capacity = b * hkv, table.shape[2] * PAGE
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"decode_attention takes bf16, fp16 or fp32, got {q.dtype}")
    if q.shape[2] != 1 or h % hkv:
        raise ValueError(f"decode_attention takes one token a row and whole groups of heads, got q {tuple(q.shape)}")
    if max(d, dv) > 256 or h // hkv > 128:
        raise ValueError(
            f"decode_attention takes head dims up to 256 and groups up to 128, got {d}, {dv} and groups of {h // hkv}"
        )
    if k_pages.shape[1] != PAGE:
        raise ValueError(f"decode_attention takes pages of {PAGE} slots, got {k_pages.shape[1]}")
    group = h // hkv
    c = config(q.dtype, d, dv, group) if launch is None else launch
    (d1, d2), (dv1, dv2), g2 = _parts_of(d), _parts_of(dv), triton.next_power_of_2(group)
    workers = max(1, min(c.per_sm * _multiprocessors(q.device), n_heads * table.shape[2]))
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    if not n_heads:
        return out, lse, q.new_empty(b, hkv, capacity + 1, dtype=torch.float32) if mass else None
    parts = torch.empty(2 * workers * g2 * (2 + dv1 + dv2), dtype=torch.float32, device=q.device)
    logits_row = capacity + 16  # rows begin at multiples of 64 bytes
    logits = torch.empty(b * h * logits_row if mass else 0, dtype=torch.float32, device=q.device)
    # A whole group's parts in one program, if they are not too many.
    one_launch = c.one_launch and tickets is not None and g2 * (dv1 + dv2) <= 4096
    heads = max(256, triton.next_power_of_2(n_heads))  # so that a kernel serves many batch sizes
    valid = valid.contiguous()
    kd, vd = k if k_dense is None else k_dense, v if v_dense is None else v_dense
    _attend_kernel[(workers,)](
        q, k, v, kd, vd, k_pages, v_pages, pos_pages, table, lens, positions, valid,
        q if sinks is None else sinks, q if alibi is None else alibi, out, lse, logits, parts,
        tickets if one_launch else parts,
        scale, softcap, window, chunk, n_heads, logits_row, capacity,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        kd.stride(0), kd.stride(1), kd.stride(2), vd.stride(0), vd.stride(1), vd.stride(2),
        table.stride(0), table.stride(1), table.stride(2), lens.stride(0), lens.stride(1), positions.stride(0),
        HKV=hkv, G=group, GP=max(16, g2), G2=g2, D=d, D1=d1, D2=d2, DV=dv, DV1=dv1, DV2=dv2, HEADS=heads,
        K_DENSE=k_dense is not None, V_DENSE=v_dense is not None, SOFTCAP=softcap != 0, WINDOW=window > 0,
        CHUNK=chunk > 0, ALIBI=alibi is not None, SINKS=sinks is not None, MASS=mass, TICKETS=one_launch,
        PARTS=_parts_at_a_time(g2 * (dv1 + dv2)), OVERLAP=c.overlap and not one_launch,
        IEEE=q.dtype == torch.float32, num_warps=c.num_warps, num_stages=c.num_stages, maxnreg=c.registers,
    )  # fmt: skip
    overlapping: dict[str, Any] = {"launch_pdl": True} if c.overlap else {}
    if not one_launch:
        _combine_kernel[(n_heads, group)](
            parts, lens, valid, q if sinks is None else sinks, out, lse, workers, n_heads, lens.stride(0), lens.stride(1),
            HKV=hkv, G=group, G2=g2, DV=dv, DV1=dv1, DV2=dv2, HEADS=heads, SINKS=sinks is not None,
            PARTS=_parts_at_a_time(dv1 + dv2), OVERLAP=c.overlap, num_warps=4, **overlapping,
        )  # fmt: skip
    if not mass:
        return out, lse, None
    found = torch.empty(b, hkv, capacity + 1, dtype=torch.float32, device=q.device)
    block = 1024
    _mass_kernel[(math.ceil((capacity + 1) / block), n_heads)](
        logits, lse, lens, valid, found, n_heads, logits_row, capacity, lens.stride(0), lens.stride(1),
        HKV=hkv, G=group, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out, lse, found


def _parts_at_a_time(row: int) -> int:
    """How many parts are summed at a time: 8 KB of them."""
    return max(1, min(64, 2048 // triton.next_power_of_2(row)))
