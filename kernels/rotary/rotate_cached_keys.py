"""Cached keys rotated where they lie, and the way back."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # slots a program; a page is a multiple


@triton.jit
def _rotate_cached_keys(
    k_pages, pos_pages, table, ta_b, ta_h, ta_p, lens, le_b, le_h, cos, sin, partner,
    D: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, UNDO: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(lens + b * le_b + h * le_h)
    if tl.program_id(0) * ROWS < length:
        live = slot < length
        page = tl.load(table + b * ta_b + h * ta_h + (tl.program_id(0) * ROWS // PAGE) * ta_p).to(tl.int64)
        at = page * PAGE + slot % PAGE
        turn = tl.load(pos_pages + at * 2 + 1, mask=live, other=0).to(tl.int64)[:, None] * D
        d = tl.arange(0, PAD)[None, :]
        mask = live[:, None] & (d < D)
        other = tl.load(partner + d, mask=d < D, other=0)
        keys = k_pages + at[:, None] * D
        x = tl.load(keys + d, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(keys + other, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cos + turn + d, mask=mask, other=1.0).to(tl.float32)
        s = tl.load(sin + turn + d, mask=mask, other=0.0).to(tl.float32)
        # Products and sums are rounded one by one (no fused multiply-add), so that results equal the reference's.
        if UNDO:
            across = tl.load(cos + turn + other, mask=mask, other=1.0).to(tl.float32)
            back = tl.load(sin + turn + other, mask=mask, other=0.0).to(tl.float32)
            turned = tl.div_rn(across * x - s * y, c * across - s * back)
        else:
            turned = c * x + s * y
        tl.debug_barrier()  # everyone has read its pairs before one of them is written
        tl.store(keys + d, turned.to(k_pages.dtype.element_ty), mask=mask)


def rotate_cached_keys(
    k_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    cos: Tensor,
    sin: Tensor,
    partner: Tensor,
    undo: bool,
) -> None:
    """See `kvrewrite::settle_keys` in kvrewrite/ops/decode.py: the reference's bits.

    k_pages (pages, PAGE, D), pos_pages (pages, PAGE, 2) int32 and cos, sin (N, D): contiguous; table (B, Hkv, P), lens (B, Hkv)
    int32: strided as they like; partner (D,) int64.
    """
    for name, x in (("k_pages", k_pages), ("pos_pages", pos_pages), ("cos", cos), ("sin", sin)):
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got shape {tuple(x.shape)}, strides {x.stride()}")
    page, dim = k_pages.shape[1:]
    b, hkv, width = table.shape
    if page % ROWS:
        raise ValueError(f"pages must hold a multiple of {ROWS} slots, got {page}")
    if table.numel() == 0:
        return
    _rotate_cached_keys[(width * page // ROWS, hkv, b)](
        k_pages, pos_pages, table, *table.stride(), lens, *lens.stride(), cos, sin, partner,
        D=dim, PAD=triton.next_power_of_2(dim), PAGE=page, ROWS=ROWS, UNDO=undo, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
