"""Attention of one new token per row on a paged cache: what decoding does at every step.

The pages of all heads lie one after the other in one list, and each of a fixed number of workers takes an equal,
contiguous part of it, across heads where need be ("stream-K"). So the time goes by the sum of the heads' lengths, not
by the longest, and the launch grid depends on shapes only. Every worker leaves, for each head that it had pages of, a
part of the softmax (maximum, sum, weighted values); a second kernel puts a head's parts, its new token and its sink
together, always in the order of the pages.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.groups import PLAIN, At, Dense, Logits, Pages, TokenOptions, Tokens
from kvrewrite.kernels.launch import begin, fetch
from kvrewrite.kernels.launch import options as launch_options
from kvrewrite.kernels.limits import split_width, why_not

PAGE = 64  # slots per page
LOG2E = 1.4426950408889634
ANY = 1 << 62
_PAGE = tl.constexpr(PAGE)
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(0.6931471805599453)


class Config(NamedTuple):
    """How the attention kernel is launched."""

    per_sm: int  # at most so many workers for each multiprocessor
    num_warps: int
    num_stages: int  # one more than the steps whose loads are under way at a time
    pages: int = 1  # pages per step, 1 or 2
    overlap: int = 0  # the second kernel begins 0: when the first has ended, 1: when it starts, 2: when its loops end

    @property
    def registers(self) -> int | None:
        """Registers a thread, so that `per_sm` workers are there at the same time; None: any number will do."""
        limit = 65536 // (self.per_sm * self.num_warps * 32) // 8 * 8
        return limit if limit < 255 else None


# For pages of 16 to 32 KB (keys and values): (B * Hkv up to, capacity up to, what). benchmarks/decode.py measures a
# shape of Llama-3.1-8B for each line.
BY_SIZE: tuple[tuple[int, int, Config], ...] = (
    (16, 8192, Config(2, 4, 3, overlap=1)),
    (16, ANY, Config(2, 4, 3, overlap=1)),
    (128, 8192, Config(2, 4, 3, overlap=1)),
    (128, ANY, Config(2, 4, 3, overlap=1)),
    (ANY, 8192, Config(2, 4, 3, overlap=1)),
    (ANY, ANY, Config(3, 4, 3)),
)


def config(dtype: torch.dtype, d: int, dv: int, group: int, n_heads: int, capacity: int) -> Config:
    """The configuration for a dtype, head dims, query heads per kv head, B * Hkv and slots per head (of the table).

    Other dims: as many workers as a multiprocessor's memory (227 KB) has room for.
    """
    page_bytes = PAGE * (d + dv) * dtype.itemsize
    if page_bytes > 64 << 10:
        return Config(1, 8, 2)
    if page_bytes > 40 << 10 or group > 16:
        return Config(1, 8, 3)
    if page_bytes > 32 << 10:
        return Config(2, 4, 3)
    if page_bytes > 16 << 10:
        return next(c for heads, slots, c in BY_SIZE if n_heads <= heads and capacity <= slots)
    return Config(4, 4, 4)


def _turning(c: Config, step_bytes: int) -> Config:
    """The configuration where cached keys are rotated: that takes registers, and a step's rows of the tables as much
    memory as its keys. (Compiled for sm_90: up to 255 registers, shared memory of up to 1.35 times a step's bytes, as
    wide as its tiles are. Not tuned.)"""
    return c._replace(per_sm=min(c.per_sm, 2), num_stages=1 if step_bytes > 168 << 10 else c.num_stages)


def worker_count(limit: int, n_heads: int, width: int, pages: int) -> int:
    """How many workers, at most `limit`, for n_heads heads with up to `width` pages, in steps of `pages`.

    If it makes use of most of `limit`, a multiple of the heads, or a divisor: then heads of equal lengths are cut
    into equal parts, no worker changes heads on the way, and there are no more parts than shorten the longest one.
    """
    if n_heads > limit:
        each = -(-n_heads // limit)
        aligned = n_heads // each if n_heads % each == 0 else 0
        enough = aligned
    else:
        enough = limit // n_heads * n_heads
        each = -(-width // min(limit // n_heads, width))
        each = -(-each // pages) * pages
        aligned = min(enough, -(-width // each) * n_heads)
    workers = aligned if 4 * enough >= 3 * limit else min(limit, n_heads * width)
    return max(1, min(workers, (2**31 - 1) // (n_heads * width)))  # page * workers is computed in 32 bits


@triton.jit
def _fetch_page(pool, page, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Begins to bring a page of a pool into L2."""
    line: tl.constexpr = 1024 // pool.dtype.element_ty.primitive_bitwidth
    lines: tl.constexpr = _PAGE * D // line
    rounded: tl.constexpr = _PAGE * (D1 if D2 == 0 else 2 * D1) // line
    fetch(pool + page * (_PAGE * D) + tl.minimum(tl.arange(0, rounded), lines - 1) * line)


@triton.jit
def live_slots(lens, valid, head, n_heads, HKV: tl.constexpr, lens_b, lens_h):
    """Cached slots that a head attends to (none in rows without a new token), and whether its row has one."""
    b = head // HKV
    there = head < n_heads
    real = tl.load(valid + b, mask=there, other=0) > 0
    n = tl.load(lens + b * lens_b + (head % HKV) * lens_h, mask=there, other=0)
    return tl.where(real, n, 0), real


@triton.jit
def first_page(worker, total, workers):
    """The first page of a worker's part of the list; every worker before `workers` has at least one."""
    return tl.where(worker < workers, total * worker // tl.maximum(workers, 1), total)


@triton.jit
def _worker_of(page, total, workers):
    """The worker whose part of the list a page is in."""
    return ((page + 1) * workers - 1) // tl.maximum(total, 1)


@triton.jit
def rotated(at, d, cos, sin, mask, HALF: tl.constexpr):
    """Channels d of rows at pointers `at`, fp32: rotated with those HALF channels away and rounded to the rows' dtype,
    as RoPE does; as they are if HALF is 0. cos, sin: pointers to a row of the tables."""
    x = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
    if HALF > 0:
        low = d < HALF
        partner = tl.load(at + tl.where(low, d + HALF, d - HALF), mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cos + d, mask=d < 2 * HALF, other=0.0).to(tl.float32)
        s = tl.load(sin + d, mask=d < 2 * HALF, other=0.0).to(tl.float32)
        x = (x * c + tl.where(low, -partner, partner) * s).to(at.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _turned_keys(low, high, at, low_d, high_d, mask, tables, D: tl.constexpr):
    """Rows of keys whose first half of D channels is `low` and the second `high`, rotated by the rows `at` of the
    tables, cos and sin, and rounded to the keys' dtype."""
    cos, sin = tables
    x, y = low.to(tl.float32), high.to(tl.float32)
    of_low = at[:, None] * D + low_d[None, :]
    of_high = at[:, None] * D + high_d[None, :]
    c = tl.load(cos + of_low, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + of_low, mask=mask, other=0.0).to(tl.float32)
    turned_low = (x * c + y * s).to(low.dtype)
    c = tl.load(cos + of_high, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + of_high, mask=mask, other=0.0).to(tl.float32)
    return turned_low, (y * c + x * s).to(low.dtype)


@triton.jit
def logit(x, softcap, scale, SOFTCAP: tl.constexpr):
    """Logits in units of log 2 of dot products x, before ALiBi."""
    if SOFTCAP:
        x = x * scale / softcap
        # tanh as 1 - 2 / (1 + e^2x), which overflows to the right limits.
        return (softcap * _LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2E))))
    return x * (scale * _LOG2E)


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
        "pos_b",
        "cos_b",
        "sin_b",
    ]
)
def _attend_kernel(
    q, k_dense, v_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, alibi, cos, sin, following, key_cos, key_sin,
    logits, parts,
    scale, softcap, window, chunk, n_heads, width, logits_row, cos_b, sin_b,
    q_b, q_h, kd_b, kd_h, kd_s, vd_b, vd_h, vd_s, table_b, table_h, table_p, lens_b, lens_h, pos_b,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, HEADS: tl.constexpr, PAGES: tl.constexpr,
    K_DENSE: tl.constexpr, V_DENSE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ALIBI: tl.constexpr, MASS: tl.constexpr, OVERLAP: tl.constexpr, IEEE: tl.constexpr,
    HALF: tl.constexpr, TURN: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A worker's part of the list. TURN: cached keys are rotated; D1 channels are then the first half, D2 the second.

    parts holds one entry for every (worker, head) that has one, at worker + head, which no two of them share: G2
    maxima, G2 sums, and G2 rows of weighted values.
    """
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    worker = tl.program_id(0)
    n_workers = tl.num_programs(0)
    # Page numbers that are likely to be needed are fetched into L2 while the lengths are on their way.
    likely = worker * n_heads // n_workers
    column = tl.arange(0, 256)
    tl.load(
        table + (likely // HKV).to(tl.int64) * table_b + (likely % HKV) * table_h + column * table_p,
        mask=column < width, volatile=True,
    )  # fmt: skip

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
    if PDL:
        if EARLY:
            mine = lo < hi
            entry_at = table + (head // HKV).to(tl.int64) * table_b + (head % HKV) * table_h + (lo - start) * table_p
            opening = tl.load(entry_at, mask=mine, other=0).to(tl.int64)
            if not K_DENSE:
                _fetch_page(k_pages, opening, D, D1, D2)
            if not V_DENSE:
                _fetch_page(v_pages, opening, DV, DV1, DV2)
            tl.extra.cuda.gdc_wait()
        if OVERLAP == 1:
            tl.extra.cuda.gdc_launch_dependents()

    row = tl.arange(0, GP)
    ok = row < G
    slot = tl.arange(0, PAGES * _PAGE)
    d1 = tl.arange(0, D1)
    split: tl.constexpr = D // 2 if TURN else D1  # the first channel of the second part
    d2 = split + tl.arange(0, D2 if D2 > 0 else 1)
    e1 = tl.arange(0, DV1)
    e2 = DV1 + tl.arange(0, DV2 if DV2 > 0 else 1)
    while lo < hi:
        b = head // HKV
        hk = head % HKV
        n = live_slots(lens, valid, head, n_heads, HKV, lens_b, lens_h)[0]
        n_pages = (n + _PAGE - 1) // _PAGE
        first = lo - start
        last = tl.minimum(hi - start, n_pages)
        end = tl.minimum(last * _PAGE, n)
        pages = table + b.to(tl.int64) * table_b + hk * table_h
        page = tl.load(pages + first * table_p, mask=first < last, other=0)
        if PAGES == 2:
            other = tl.load(pages + (first + 1) * table_p, mask=first + 1 < last, other=0)

        at = q + b.to(tl.int64) * q_b + (hk * G + row)[:, None] * q_h
        turn, turn_s = cos + b * cos_b, sin + b * sin_b
        q1 = rotated(at, d1[None, :], turn, turn_s, ok[:, None] & (d1 < (split if TURN else D))[None, :], HALF).to(
            q.dtype.element_ty
        )
        if D2 > 0:
            q2 = rotated(at, d2[None, :], turn, turn_s, ok[:, None] & (d2 < D)[None, :], HALF).to(q.dtype.element_ty)
        if WINDOW or CHUNK or ALIBI or TURN:
            now = tl.load(positions + b * pos_b).to(tl.int32)
        if TURN:  # what a slot's second position differs from what its key is rotated by
            nearer = tl.load(following + b).to(tl.int32) - now
        if ALIBI:
            slope = tl.load(alibi + hk * G + row, mask=ok, other=0.0).to(tl.float32) * _LOG2E

        m = tl.full([GP], float("-inf"), tl.float32)
        # Weights slot by slot, summed after the loop: for a sum all warps would wait for each other.
        weights = tl.zeros([GP, PAGES * _PAGE], tl.float32)
        acc1 = tl.zeros([GP, DV1], tl.float32)
        acc2 = tl.zeros([GP, DV2 if DV2 > 0 else 1], tl.float32)
        for p in range(first, last, PAGES):
            # The next pages' numbers are read a step ahead, so that their keys' addresses are known in time.
            if PAGES == 2:
                held = tl.where(slot < _PAGE, page, other).to(tl.int64)[:, None]
                other = tl.load(pages + tl.minimum(p + 3, last - 1) * table_p)
                inside = slot % _PAGE
            else:
                held = page.to(tl.int64)
                inside = slot
            page = tl.load(pages + tl.minimum(p + PAGES, last - 1) * table_p)
            here = slot < end - p * _PAGE
            if K_DENSE:
                k_at = k_dense + b.to(tl.int64) * kd_b + hk.to(tl.int64) * kd_h + tl.cast(p * _PAGE, tl.int64) * kd_s
                k_at = k_at + slot[:, None] * kd_s
            else:
                k_at = k_pages + held * (_PAGE * D) + inside[:, None] * D
            k1 = tl.load(k_at + d1[None, :], mask=here[:, None] & (d1 < (split if TURN else D))[None, :], other=0.0)
            if D2 > 0:
                k2 = tl.load(k_at + d2[None, :], mask=here[:, None] & (d2 < D)[None, :], other=0.0)
            if TURN:
                if PAGES == 2:
                    rank_at = pos_pages + tl.reshape(held, [2 * _PAGE]) * (2 * _PAGE)
                else:
                    rank_at = pos_pages + held * (2 * _PAGE)
                rank = tl.load(rank_at + inside * 2 + 1, mask=here, other=0)
                by = tl.maximum(tl.where(here, rank + nearer, 0), 0)
                k1, k2 = _turned_keys(k1, k2, by, d1, d2, here[:, None] & (d1 < split)[None, :], (key_cos, key_sin), D)
            x = tl.dot(q1, tl.trans(k1.to(q1.dtype)), input_precision=precision)
            if D2 > 0:
                x = tl.dot(q2, tl.trans(k2.to(q1.dtype)), x, input_precision=precision)
            x = logit(x, softcap, scale, SOFTCAP)
            seen = here
            if WINDOW or CHUNK or ALIBI:
                if PAGES == 2:
                    pos_at = pos_pages + tl.reshape(held, [2 * _PAGE]) * (2 * _PAGE)
                else:
                    pos_at = pos_pages + held * (2 * _PAGE)
                pos = tl.load(pos_at + inside * 2, mask=here, other=0)
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
            if WINDOW or CHUNK:  # otherwise every step has a slot that is seen
                base = tl.where(top == float("-inf"), 0.0, top)
            else:
                base = top
            alpha = tl.exp2(m - base)
            weight = tl.exp2(x - base[:, None])
            weights = weights * alpha[:, None] + weight
            if V_DENSE:
                v_at = v_dense + b.to(tl.int64) * vd_b + hk.to(tl.int64) * vd_h + tl.cast(p * _PAGE, tl.int64) * vd_s
                v_at = v_at + slot[:, None] * vd_s
            else:
                v_at = v_pages + held * (_PAGE * DV) + inside[:, None] * DV
            v1 = tl.load(v_at + e1[None, :], mask=here[:, None] & (e1 < DV)[None, :], other=0.0).to(q1.dtype)
            acc1 = tl.dot(weight.to(q1.dtype), v1, acc1 * alpha[:, None], input_precision=precision)
            if DV2 > 0:
                v2 = tl.load(v_at + e2[None, :], mask=here[:, None] & (e2 < DV)[None, :], other=0.0).to(q1.dtype)
                acc2 = tl.dot(weight.to(q1.dtype), v2, acc2 * alpha[:, None], input_precision=precision)
            m = top

        lo = start + last
        if PDL and OVERLAP == 2:  # noqa: SIM102 (decided when compiling)
            if lo >= hi:
                tl.extra.cuda.gdc_launch_dependents()
        entry = parts + (worker + head).to(tl.int64) * (G2 * (2 + DV1 + DV2))
        tl.store(entry + row, m, mask=ok)
        tl.store(entry + G2 + row, tl.sum(weights, 1), mask=ok)
        to = entry + 2 * G2 + row[:, None] * (DV1 + DV2)
        tl.store(to + e1[None, :], acc1, mask=ok[:, None])
        if DV2 > 0:
            tl.store(to + e2[None, :], acc2, mask=ok[:, None])
        start += n_pages
        head += 1


@triton.jit(do_not_specialize=["n_workers", "n_heads", "capacity", "lens_b", "lens_h", "cos_b", "sin_b"])
def combine_kernel(
    q, k, v, parts, lens, valid, sinks, cos, sin, out, lse, logits, scale, softcap, n_workers, n_heads, logits_row,
    capacity, cos_b, sin_b, q_b, q_h, k_b, k_h, v_b, v_h, lens_b, lens_h,
    HKV: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    ROW: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, MASS: tl.constexpr,
    PARTS: tl.constexpr, SLICE: tl.constexpr, HALF: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """SLICE output dims of one query head: what the workers left, PARTS at a time, the new token, and the sink.

    The kernel before is `_attend_kernel`, which lets this one begin after its own wait and writes parts and logits
    only: all else is read without waiting.
    """
    head = tl.program_id(0)
    g = tl.program_id(1)
    b = head // HKV
    hk = head % HKV
    real = tl.load(valid + b) > 0
    ids = tl.arange(0, HEADS)
    n_live = live_slots(lens, valid, ids, n_heads, HKV, lens_b, lens_h)[0]
    counts = (n_live + _PAGE - 1) // _PAGE
    start = tl.sum(tl.where(ids < head, counts, 0), 0)
    end = tl.sum(tl.where(ids <= head, counts, 0), 0)
    total = tl.sum(counts, 0)

    d = tl.arange(0, DP)
    e = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    turn, turn_s = cos + b * cos_b, sin + b * sin_b
    new_q = rotated(q + b.to(tl.int64) * q_b + (hk * G + g) * q_h, d, turn, turn_s, d < D, HALF)
    new_k = rotated(k + b.to(tl.int64) * k_b + hk * k_h, d, turn, turn_s, d < tl.where(real, D, 0), HALF)
    new_v = tl.load(v + b.to(tl.int64) * v_b + hk * v_h + e, mask=e < tl.where(real, DV, 0), other=0.0).to(tl.float32)
    x = logit(tl.sum(new_q * new_k, 0), softcap, scale, SOFTCAP)
    m = tl.where(real, x, float("-inf"))
    denom = tl.where(real, 1.0, 0.0)
    acc = new_v

    workers = tl.minimum(n_workers, total)
    first = _worker_of(start, total, workers)
    n_parts = tl.where(end > start, _worker_of(end - 1, total, workers) - first + 1, 0)
    width: tl.constexpr = G2 * (2 + ROW)
    begin(PDL)
    for i in tl.range(0, n_parts, PARTS, num_stages=1):
        part = i + tl.arange(0, PARTS)
        here = part < n_parts
        entry = parts + (head + first + part).to(tl.int64) * width
        ms = tl.load(entry + g, mask=here, other=float("-inf"))
        ls = tl.load(entry + G2 + g, mask=here, other=0.0)
        at = entry[:, None] + (2 * G2 + g * ROW + e)[None, :]
        a = tl.load(at, mask=here[:, None] & (e < DV)[None, :], other=0.0)
        top = tl.maximum(m, tl.max(ms, 0))  # the new token makes it finite
        alpha = tl.exp2(m - top)
        weight = tl.exp2(ms - top)
        denom = denom * alpha + tl.sum(weight * ls, 0)
        acc = acc * alpha + tl.sum(a * weight[:, None], 0)
        m = top

    if SINKS:
        sink = tl.load(sinks + hk * G + g).to(tl.float32) * _LOG2E
        top = tl.maximum(m, sink)
        alpha = tl.exp2(m - top)
        denom = denom * alpha + tl.exp2(sink - top)
        acc *= alpha
        m = top
    # A row that sees nothing (one without a new token) gives 0 and -inf.
    norm = tl.where(denom > 0, denom, 1.0)
    to = head * G + g
    tl.store(out + to.to(tl.int64) * DV + e, (acc / norm).to(out.dtype.element_ty), mask=e < DV)
    if tl.program_id(2) == 0:
        tl.store(lse + to, tl.where(denom > 0, (m + tl.log2(norm)) * _LN2, float("-inf")))
        if MASS:
            tl.store(logits + to.to(tl.int64) * logits_row + capacity, x)


@triton.jit(do_not_specialize=["n_heads", "lens_b", "lens_h"])
def mass_kernel(
    logits, lse, lens, valid, mass, n_heads, logits_row, capacity, lens_b, lens_h,
    HKV: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax weights from logits, summed over a group's query heads, GB of them at a time."""
    begin(PDL)
    head = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, real = live_slots(lens, valid, head, n_heads, HKV, lens_b, lens_h)
    seen = (slot < n) | (slot == tl.where(real, capacity, -1))
    weight = tl.zeros([BLOCK], tl.float32)
    for g0 in range(0, G, GB):
        g = g0 + tl.arange(0, GB)
        of = (head * G + g).to(tl.int64)
        x = tl.load(
            logits + of[:, None] * logits_row + slot[None, :],
            mask=(g < G)[:, None] & seen[None, :],
            other=float("-inf"),
        )
        norm = tl.load(lse + of, mask=g < tl.where(real, G, 0), other=0.0) * _LOG2E
        weight += tl.sum(tl.exp2(x - norm[:, None]), 0)
    tl.store(mass + head.to(tl.int64) * (capacity + 1) + slot, weight, mask=slot <= capacity)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def decode_attention(
    tokens: Tokens,
    dense: Dense,
    cache: Pages,
    at: At,
    logits: Logits,
    options: TokenOptions = PLAIN,
    launch: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`kvrewrite::cached_attention` for one new token per row.

    q, k, v: bf16, fp16 or fp32, last dim contiguous: the new tokens, of which row b has one if valid is 1; they are not
    in the cache yet and are later than everything that is. Nothing is hidden.

    cos, sin: (B, 1, D) in q's dtype, last dim contiguous: then q and k are not rotated yet, each channel's partner is
    half a head away. early: the kernel before writes none of pools, table, lens and valid, so that the first pages may
    come in while it runs.

    following (B,) int64, key_cos and key_sin (N, D), contiguous: cached keys are rotated as they are read, by following
    - positions + the second position of their slot, which must be below N; each channel's partner is half a head away.

    Returns out (B, H, 1, Dv) in q's dtype, the natural log-sum-exp (B, H, 1) fp32, and with `mass` what each slot and
    the new token received, (B, Hkv, C + 1) fp32, summed over the group's query heads (None without). Rows without a new
    token get 0, -inf (or the sink) and 0.
    """
    (q, k, v), (k_dense, v_dense), (positions, valid) = tokens, dense, at
    k_pages, v_pages, pos_pages, table, lens = cache
    sinks, alibi, _, scale, softcap, window, chunk = logits
    mass, cos, sin, early, following, key_cos, key_sin = options
    b, h, _, d = q.shape
    hkv, dv = k.shape[1], v.shape[3]
    n_heads, capacity = b * hkv, table.shape[2] * PAGE
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"decode_attention takes bf16, fp16 or fp32, got {q.dtype}")
    if q.shape[2] != 1 or h % hkv:
        raise ValueError(f"decode_attention takes one token per row and whole groups of heads, got q {tuple(q.shape)}")
    if why := why_not(d, dv, h // hkv, 1, False):
        raise ValueError(f"decode_attention: {why}")
    if k_pages.shape[1] != PAGE:
        raise ValueError(f"decode_attention takes pages of {PAGE} slots, got {k_pages.shape[1]}")
    check_rotation(q, cos, sin)
    if following is not None:
        _check_tables(d, k_dense, key_cos, key_sin)
    group = h // hkv
    width = table.shape[2]
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    found = torch.empty(b, hkv, capacity + 1, dtype=torch.float32, device=q.device) if mass else None
    if not n_heads:
        return out, lse, found
    c = config(q.dtype, d, dv, group, n_heads, capacity) if launch is None else launch
    (d1, d2), (dv1, dv2), g2 = split_width(d), split_width(dv), triton.next_power_of_2(group)
    if following is not None:
        d1 = d2 = max(16, triton.next_power_of_2(d // 2))
    if key_cos is not None and launch is None:
        turned_bytes = (d1 + d2) * (q.element_size() + 2 * key_cos.element_size())
        c = _turning(c, PAGE * (turned_bytes + (dv1 + dv2) * q.element_size()) * c.pages)
    workers = worker_count(c.per_sm * multiprocessors(q.device), n_heads, max(width, 1), c.pages)
    parts = torch.empty((workers + n_heads) * g2 * (2 + dv1 + dv2), dtype=torch.float32, device=q.device)
    logits_row = capacity + 16  # rows begin at multiples of 64 bytes
    scratch = torch.empty(b * h * logits_row, dtype=torch.float32, device=q.device) if mass else parts
    # Two sizes serve most batches; one warp can scan the small one.
    heads = 32 if n_heads <= 32 else max(256, triton.next_power_of_2(n_heads))
    valid = valid.contiguous()
    kd, vd = k if k_dense is None else k_dense, v if v_dense is None else v_dense
    pdl = launch_options(q.device)
    turn, turn_s = (q, q) if cos is None or sin is None else (cos, sin)
    half = 0 if cos is None else d // 2
    turned = (valid, q, q) if following is None else (following, key_cos, key_sin)
    _attend_kernel[(workers,)](
        q, kd, vd, k_pages, v_pages, pos_pages, table, lens, positions, valid, q if alibi is None else alibi, turn, turn_s,
        *turned, scratch, parts, scale, softcap, window, chunk, n_heads, width, logits_row, turn.stride(0), turn_s.stride(0),
        q.stride(0), q.stride(1), kd.stride(0), kd.stride(1), kd.stride(2), vd.stride(0), vd.stride(1), vd.stride(2),
        table.stride(0), table.stride(1), table.stride(2), lens.stride(0), lens.stride(1), positions.stride(0),
        HKV=hkv, G=group, GP=max(16, g2), G2=g2, D=d, D1=d1, D2=d2, DV=dv, DV1=dv1, DV2=dv2, HEADS=heads, PAGES=c.pages,
        K_DENSE=k_dense is not None, V_DENSE=v_dense is not None, SOFTCAP=softcap != 0, WINDOW=window > 0,
        CHUNK=chunk > 0, ALIBI=alibi is not None, MASS=mass, OVERLAP=c.overlap, IEEE=q.dtype == torch.float32, HALF=half,
        TURN=following is not None, EARLY=early,
        num_warps=c.num_warps, num_stages=c.num_stages, maxnreg=c.registers, **pdl,
    )  # fmt: skip
    n_parts, piece = tile(workers, n_heads, group, dv)
    combine_kernel[(n_heads, group, -(-dv // piece))](
        q, k, v, parts, lens, valid, q if sinks is None else sinks, turn, turn_s, out, lse, scratch, scale, softcap,
        workers, n_heads, logits_row, capacity, turn.stride(0), turn_s.stride(0),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        lens.stride(0), lens.stride(1),
        HKV=hkv, G=group, G2=g2, D=d, DP=triton.next_power_of_2(d), DV=dv, ROW=dv1 + dv2, HEADS=heads,
        SOFTCAP=softcap != 0, SINKS=sinks is not None, MASS=mass, PARTS=n_parts, SLICE=piece, HALF=half,
        num_warps=4, **pdl,
    )  # fmt: skip
    if found is not None:
        block = 1024
        mass_kernel[(math.ceil((capacity + 1) / block), n_heads)](
            scratch, lse, lens, valid, found, n_heads, logits_row, capacity, lens.stride(0), lens.stride(1),
            HKV=hkv, G=group, GB=min(g2, 4), BLOCK=block, num_warps=4, **pdl,
        )  # fmt: skip
    return out, lse, found


def _check_tables(d: int, k_dense: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raises ValueError unless cached keys of d channels, in their pages, can be rotated by the tables."""
    if k_dense is not None or d % 2:
        raise ValueError(f"keys that are rotated come from pages and have an even number of channels, got {d}")
    for x in (cos, sin):
        if x is None or x.dim() != 2 or x.shape[1] != d or not x.is_contiguous():
            got = "none" if x is None else f"{tuple(x.shape)}, strides {x.stride()}"
            raise ValueError(f"expected contiguous key_cos and key_sin of shape (N, {d}), got {got}")


def check_rotation(q: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raises ValueError unless cos and sin rotate tokens q (B, H, 1, D), or are both None."""
    if (cos is None) != (sin is None):
        raise ValueError("got one of cos and sin, expected both or none")
    for x in (cos, sin):
        if x is not None:
            expected = (q.shape[0], 1, q.shape[3])
            if x.shape != expected or x.dtype != q.dtype or x.stride(2) != 1 or q.shape[3] % 2:
                raise ValueError(
                    f"cos or sin is {tuple(x.shape)} {x.dtype}, expected {expected} {q.dtype}, of even width"
                )


def tile(workers: int, n_heads: int, group: int, dv: int) -> tuple[int, int]:
    """How many parts, and how many output dims of one query head, a program of the second kernel takes at a time: all
    parts of a head at once if heads are about equally long, and narrow slices if there are few heads."""
    n_parts = min(64, triton.next_power_of_2(workers // n_heads + 2))
    piece = 32 if n_heads * group * -(-dv // 32) <= 512 else triton.next_power_of_2(dv)
    return n_parts, min(piece, max(32, 8192 // n_parts))
