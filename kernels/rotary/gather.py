"""The cached keys and values of every head, dense in slot order. Keys that are cached unrotated are rotated on the way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.groups import UNROTATED, KeyRotation


@triton.jit
def _copy(
    pool, out, came, to, live, there, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr
):
    """Channels [START, START + WIDTH) of a tile of slots; dead ones become zeros."""
    d = tl.arange(0, PAD)[None, :]
    x = tl.load(pool + came[:, None] * D + START + d, mask=live[:, None] & (d < WIDTH), other=0.0)
    tl.store(out + to[:, None] * D + START + d, x, mask=there[:, None] & (d < WIDTH))


@triton.jit
def _gather(
    k_pages, v_pages, table, ta_b, ta_h, ta_p, lens, le_b, le_h, rotary, ro_b, ro_h, ro_c, cos, sin, partner,
    k_dense, v_dense, capacity, kv_heads,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, ROTATE: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """ROWS slots of HEADS heads: heads whose slots have the same positions find cos and sin in the L1 cache."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    there = slot < capacity
    for head in range(tl.program_id(1) * HEADS, tl.minimum(tl.program_id(1) * HEADS + HEADS, kv_heads)):
        h = b * 0 + head  # int64
        live = slot < tl.load(lens + b * le_b + h * le_h)
        page = tl.load(table + b * ta_b + h * ta_h + (slot // PAGE) * ta_p, mask=live, other=0).to(tl.int64)
        came = page * PAGE + slot % PAGE
        to = (b * kv_heads + h) * capacity + slot
        if VALUES:
            _copy(v_pages, v_dense, came, to, live, there, DV, 0, DV, DV_PAD)
        if KEYS and not ROTATE:
            _copy(k_pages, k_dense, came, to, live, there, D, 0, D, D_PAD)
        if KEYS and ROTATE:
            at = tl.load(rotary + b * ro_b + h * ro_h + slot * ro_c, mask=live, other=0)
            keys, turn, out = k_pages + came[:, None] * D, at[:, None] * D, k_dense + to[:, None] * D
            # Products and sums are rounded one by one (no fused multiply-add), so that results equal the reference's.
            if HALF > 0:
                d = tl.arange(0, HALF_PAD)[None, :]
                mask = live[:, None] & (d < HALF)
                x = tl.load(keys + d, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(keys + HALF + d, mask=mask, other=0.0).to(tl.float32)
                c = tl.load(cos + turn + d, mask=mask, other=0.0).to(tl.float32)
                s = tl.load(sin + turn + d, mask=mask, other=0.0).to(tl.float32)
                written = there[:, None] & (d < HALF)
                tl.store(out + d, (x * c + y * s).to(k_dense.dtype.element_ty), mask=written)
                c = tl.load(cos + turn + HALF + d, mask=mask, other=0.0).to(tl.float32)
                s = tl.load(sin + turn + HALF + d, mask=mask, other=0.0).to(tl.float32)
                tl.store(out + HALF + d, (y * c + x * s).to(k_dense.dtype.element_ty), mask=written)
                if 2 * HALF < D:
                    _copy(k_pages, k_dense, came, to, live, there, D, 2 * HALF, D - 2 * HALF, REST_PAD)
            else:
                d = tl.arange(0, D_PAD)[None, :]
                mask = live[:, None] & (d < D)
                other = tl.load(partner + d, mask=d < D, other=0)
                x = tl.load(keys + d, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(keys + other, mask=mask, other=0.0).to(tl.float32)
                c = tl.load(cos + turn + d, mask=mask, other=0.0).to(tl.float32)
                s = tl.load(sin + turn + d, mask=mask, other=0.0).to(tl.float32)
                tl.store(out + d, (x * c + y * s).to(k_dense.dtype.element_ty), mask=there[:, None] & (d < D))


def gather_config(row_bytes: int, rotated: bool, half: int) -> tuple[int, int, int]:
    """(ROWS, HEADS, warps): about 4 KiB of keys and as much of values a tile (measured on an H200); half of it where masks take
    registers."""
    rows = max(8, min(64, 4096 // row_bytes))
    if not rotated:
        return rows, 1, 4
    return (rows, 8, 4) if half == triton.next_power_of_2(max(half, 1)) or rows == 8 or not half else (rows // 2, 8, 4)


def gather(
    k_pages: Tensor | None,
    v_pages: Tensor | None,
    table: Tensor,
    lens: Tensor,
    rotation: KeyRotation = UNROTATED,
    config: tuple[int, int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The slots of every head, dense and contiguous: (B, Hkv, C, D) and (B, Hkv, C, Dv) in the pools' dtypes, or None for a
    pool that is None. Slots from lens on become zeros.

    k_pages (pages, PAGE, D), v_pages (pages, PAGE, Dv): contiguous; table (B, Hkv, P), lens (B, Hkv) int32: strided as they
    like; C = P * PAGE. With rotary, keys are rotated exactly as `kvrewrite::rotate` does it. Positions of live slots must be
    below N. The caller checks once, on the host, whether `half` may be given. config: for measurements.
    """
    rotary, cos, sin, partner, half = rotation
    pools = [x for x in (k_pages, v_pages) if x is not None]
    if not pools:
        return None, None
    b, hkv, width = table.shape
    page = pools[0].shape[1]
    capacity, unused = width * page, table
    for pool in pools:
        if not pool.is_contiguous():
            raise ValueError(f"pools must be contiguous, got shape {tuple(pool.shape)}, strides {pool.stride()}")
    rotated = rotary is not None and k_pages is not None
    if rotated and (cos is None or sin is None or (partner is None and not half)):
        raise ValueError("rotary positions need cos, sin and either partner or half")
    if rotated and not (cos.is_contiguous() and sin.is_contiguous()):  # type: ignore[union-attr]
        raise ValueError("cos and sin must be contiguous")
    k_dim = k_pages.shape[2] if k_pages is not None else 1
    v_dim = v_pages.shape[2] if v_pages is not None else 1
    if half and 2 * half > k_dim:
        raise ValueError(f"half = {half}, but keys have {k_dim} channels")
    k_dense = None if k_pages is None else k_pages.new_empty(b, hkv, capacity, k_dim)
    v_dense = None if v_pages is None else v_pages.new_empty(b, hkv, capacity, v_dim)
    row_bytes = max(triton.next_power_of_2(x.shape[2]) * x.element_size() for x in pools)
    rows, heads, warps = gather_config(row_bytes, rotated, half) if config is None else config
    heads = min(heads, hkv)
    _gather[(triton.cdiv(capacity, rows), triton.cdiv(hkv, heads), b)](
        unused if k_pages is None else k_pages, unused if v_pages is None else v_pages, table, *table.stride(), lens,
        *lens.stride(), rotary if rotated else unused, *(rotary.stride() if rotated and rotary is not None else (0, 0, 0)),
        cos if rotated else unused, sin if rotated else unused, partner if rotated and not half else unused,
        unused if k_dense is None else k_dense, unused if v_dense is None else v_dense, capacity, hkv,
        D=k_dim, D_PAD=triton.next_power_of_2(k_dim), DV=v_dim, DV_PAD=triton.next_power_of_2(v_dim), HALF=half,
        HALF_PAD=triton.next_power_of_2(max(half, 1)), REST_PAD=triton.next_power_of_2(max(k_dim - 2 * half, 1)),
        KEYS=k_pages is not None, VALUES=v_pages is not None, ROTATE=rotated, PAGE=page, ROWS=rows, HEADS=heads,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return k_dense, v_dense
