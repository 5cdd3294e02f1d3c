"""A few new tokens on the GPU where nothing goes: they are written after the last slot of every head, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from kvrewrite.kernels.groups import Cache, NewTokens, Rows
from kvrewrite.kernels.launch import begin, options


@triton.jit(
    do_not_specialize=["k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "po_b", "po_t", "ro_b", "ro_t", "ta_b", "ta_h"]
)
def _append_kernel(
    k, v, positions, rotary, valid, k_pages, v_pages, score_pages, pos_pages, table, lens, k_b, k_h, k_t, v_b, v_h, v_t,
    po_b, po_t, ro_b, ro_t, ta_b, ta_h, ta_p, le_b, le_h, HKV: tl.constexpr, T: tl.constexpr, TP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All new tokens of one head of one row."""
    head = tl.program_id(0)
    b = (head // HKV).to(tl.int64)
    h = (head % HKV).to(tl.int64)
    begin(PDL)
    n = tl.load(lens + b * le_b + h * le_h)
    arriving = tl.minimum(tl.load(valid + b).to(tl.int32), T)
    token = tl.arange(0, TP)
    there = token < arriving
    slot = n + token
    page = tl.load(table + b * ta_b + h * ta_h + (slot // PAGE) * ta_p, mask=there, other=0).to(tl.int64)
    to = page * PAGE + slot % PAGE
    d, e = tl.arange(0, DP), tl.arange(0, DVP)
    of_k, of_v = there[:, None] & (d < D)[None, :], there[:, None] & (e < DV)[None, :]
    key = tl.load(k + b * k_b + h * k_h + token[:, None] * k_t + d[None, :], mask=of_k, other=0.0)
    value = tl.load(v + b * v_b + h * v_h + token[:, None] * v_t + e[None, :], mask=of_v, other=0.0)
    pos = tl.load(positions + b * po_b + token * po_t, mask=there, other=0).to(tl.int32)
    turn = tl.load(rotary + b * ro_b + token * ro_t, mask=there, other=0).to(tl.int32)
    tl.store(k_pages + to[:, None] * D + d[None, :], key.to(k_pages.dtype.element_ty), mask=of_k)
    tl.store(v_pages + to[:, None] * DV + e[None, :], value.to(v_pages.dtype.element_ty), mask=of_v)
    tl.store(score_pages + to, tl.zeros([TP], tl.float32), mask=there)
    tl.store(pos_pages + to * 2, pos, mask=there)
    tl.store(pos_pages + to * 2 + 1, turn, mask=there)
    tl.debug_barrier()  # everyone has read the length before it is written
    tl.store(lens + b * le_b + h * le_h, n + arriving)


def append(new: NewTokens, rows: Rows, cache: Cache) -> None:
    """`kvrewrite::append_slots`, in place. k, v: last dim contiguous; valid and the pools contiguous."""
    k, v, valid = new.k, new.v, rows.valid
    b, hkv, tokens, d = k.shape
    dv, page = v.shape[3], cache.k_pages.shape[1]
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"the last dim of k and v must be contiguous, got strides {k.stride()} and {v.stride()}")
    if not all(pool.is_contiguous() for pool in cache[:4]) or not valid.is_contiguous():
        raise ValueError("append_slots takes contiguous pools and a contiguous valid")
    _append_kernel[(b * hkv,)](
        k, v, rows.positions, rows.rotary, valid, *cache, *k.stride()[:3], *v.stride()[:3], *rows.positions.stride(),
        *rows.rotary.stride(), *cache.table.stride(), *cache.lens.stride(), HKV=hkv, T=tokens,
        TP=triton.next_power_of_2(tokens), D=d, DP=triton.next_power_of_2(d), DV=dv, DVP=triton.next_power_of_2(dv),
        PAGE=page, num_warps=4, **options(k.device),
    )  # fmt: skip
