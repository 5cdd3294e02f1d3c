"""`kvrewrite::slot_rotary` on the GPU: the ranks of cached slots by position, whatever their order.

Positions are unique within a head, so a rank is a number of positions that are there: one byte per position is set to 1
by the slots that hold it, bytes are summed up eight at a time, and a slot reads off how many lie after its own. No
atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_bytes(x):
    """The sum of the 8 bytes of an int64, each 0 or 1."""
    x = x + (x >> 32)
    x = x + (x >> 16)
    return ((x + (x >> 8)) & 0xFF).to(tl.int32)


@triton.jit
def _mark(
    pos_pages, table, ta_b, ta_h, ta_p, lens, le_b, le_h, renew, marks, positions, kv_heads,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sets the byte of every position that a live slot holds; marks (B * Hkv, positions)."""
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    h = (row % kv_heads).to(tl.int64)
    length = tl.load(lens + b * le_b + h * le_h)
    if tl.load(renew + b) != 0:
        slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = slot < length
        page = tl.load(table + b * ta_b + h * ta_h + (slot // PAGE) * ta_p, mask=live, other=0).to(tl.int64)
        pos = tl.load(pos_pages + (page * PAGE + slot % PAGE) * 2, mask=live, other=0)
        one = tl.full([BLOCK], 1, tl.uint8)
        tl.store(marks + row.to(tl.int64) * positions + pos, one, mask=live & (pos < positions))


@triton.jit
def _accumulate(words, before, renew, count, kv_heads, BLOCK: tl.constexpr):
    """before[i] = bytes set in the words before the i-th of a head's `count`: one program per head."""
    row = tl.program_id(0)
    if tl.load(renew + row // kv_heads) != 0:
        words += row.to(tl.int64) * count
        before += row.to(tl.int64) * count
        done = row * 0
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            here = _sum_bytes(tl.load(words + i, mask=i < count, other=0))
            tl.store(before + i, done + tl.cumsum(here, 0) - here, mask=i < count)
            done += tl.sum(here, 0)


@triton.jit
def _rank(
    pos_pages, table, ta_b, ta_h, ta_p, lens, le_b, le_h, following, renew, words, before, rotary, count, capacity, kv_heads,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotary positions of a block of slots; renewed ones are stored with the slots, too."""
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    h = (row % kv_heads).to(tl.int64)
    length = tl.load(lens + b * le_b + h * le_h)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = slot < length
    page = tl.load(table + b * ta_b + h * ta_h + (slot // PAGE) * ta_p, mask=live, other=0).to(tl.int64)
    place = pos_pages + (page * PAGE + slot % PAGE) * 2
    if tl.load(renew + b) != 0:
        pos = tl.load(place, mask=live, other=0)
        word = row.to(tl.int64) * count + pos // 8
        # Of the slot's own word, the bytes below its own.
        below = tl.load(words + word, mask=live, other=0) & ((tl.full([BLOCK], 1, tl.int64) << ((pos % 8) * 8)) - 1)
        earlier = tl.load(before + word, mask=live, other=0) + _sum_bytes(below)
        found = tl.maximum(tl.load(following + b) - length + earlier, 0)
        tl.store(place + 1, found.to(tl.int32), mask=live)
    else:
        found = tl.load(place + 1, mask=live, other=0).to(tl.int64)
    tl.store(rotary + row.to(tl.int64) * capacity + slot, tl.where(live, found, 0), mask=slot < capacity)


def rank_config(capacity: int) -> tuple[int, int, int]:
    """(slots per program, words per iteration of the accumulating program, its warps)."""
    return (256, 1024, 4) if capacity <= 4096 else (512, 4096, 8)


def slot_rotary(
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    following: Tensor,
    renew: Tensor,
    *,
    max_position: int,
    config: tuple[int, int, int] | None = None,
) -> Tensor:
    """`kvrewrite::slot_rotary`: rotary positions (B, Hkv, C) int64 of cached slots, those of rows with renew (B,)
    bool ranked again and stored in pos_pages first.

    pos_pages (pages, PAGE, 2) int32, contiguous; table (B, Hkv, P) and lens (B, Hkv) int32, strided as they like;
    following (B,) int64. max_position: every live slot's position must be below it; B * Hkv * max_position bytes of
    scratch memory are used, so round up, but not far. Slots are in any order, positions are unique within a head and
    not negative. config: another than `rank_config` gives, for measurements.
    """
    b, hkv, width = table.shape
    page = pos_pages.shape[1]
    if not pos_pages.is_contiguous():
        raise ValueError(f"pos_pages must be contiguous, got strides {pos_pages.stride()}")
    capacity, rows, count = width * page, b * hkv, triton.cdiv(max_position, 8)
    block, words, warps = rank_config(capacity) if config is None else config
    marks = torch.zeros(rows, count, dtype=torch.int64, device=table.device)
    before = torch.empty(rows, count, dtype=torch.int32, device=table.device)
    rotary = torch.empty(b, hkv, capacity, dtype=torch.int64, device=table.device)
    flags = renew.view(torch.uint8)
    grid = (triton.cdiv(capacity, block), rows)
    slots = (pos_pages, table, *table.stride(), lens, *lens.stride())
    _mark[grid](*slots, flags, marks.view(torch.uint8), count * 8, hkv, PAGE=page, BLOCK=block, num_warps=4)
    _accumulate[(rows,)](marks, before, flags, count, hkv, BLOCK=words, num_warps=warps)
    _rank[grid](
        *slots, following, flags, marks, before, rotary, count, capacity, hkv, PAGE=page, BLOCK=block, num_warps=4
    )
    return rotary
