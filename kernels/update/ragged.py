"""What ragged evictions need besides select.py: budgets that the heads of a layer share (Ada-KV), and pages dealt on
the device.

Shared budgets: the heads' unprotected entries compete for the sum of the heads' unprotected budgets. The worth of the
last that wins is found by its four bytes, most significant first: a pass counts, for each head, the entries in question
by their next byte. Counts are integers, so it does not matter in which order programs add theirs. Of equal entries
those of the lower head win, so counts are all that budgets need; which entries they are is `_plan`'s business.

Scratch memory of a head is that of select.py: `stride` int32 keys, and facts of which 3 is how many entries later
queries see, 4 how many of them are protected, and 5 how many keys there are (0: its row does not share).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.groups import Cache

DEAD = tl.constexpr(-(2**31))  # as in select.py
PROTECTED = tl.constexpr(0x7F800000)


@triton.jit
def _wanted(facts, keep, ke_h, kv_heads, HEADS: tl.constexpr):
    """For each head of a row (HEADS,): entries seen, protected ones, its budget, and its unprotected budget."""
    head = tl.arange(0, HEADS)
    there = head < kv_heads
    seen = tl.load(facts + head * 8 + 3, mask=there, other=0)
    protected = tl.load(facts + head * 8 + 4, mask=there, other=0)
    budget = tl.maximum(tl.load(keep + head * ke_h, mask=there, other=0).to(tl.int32), 0)
    return seen, protected, budget, tl.maximum(budget.to(tl.int64) - protected, 0)


@triton.jit
def _counted(counts, digit, kv_heads, HEADS: tl.constexpr):
    """Entries of each head by a byte: (HEADS, 256) int32."""
    head = tl.arange(0, HEADS)[:, None]
    at = counts + (head * 4 + digit) * 256 + tl.arange(0, 256)[None, :]
    return tl.load(at, mask=head < kv_heads, other=0)


@triton.jit
def _step(total, left):
    """The byte of the left-th largest of `total` (256,) entries by byte, and how many of those with that byte are among
    them."""
    byte = tl.arange(0, 256)
    from_here = tl.sum(total, 0) - tl.cumsum(total, 0) + total  # entries with this byte or a larger one
    found = tl.max(tl.where(from_here >= left, byte, 0), 0)
    return found, left - tl.sum(tl.where(byte > found, total, 0), 0)


@triton.jit
def _count_bytes(
    keys, facts, floor, valid, keep, ke_b, ke_h, counts, stride, kv_heads,
    DIGIT: tl.constexpr, HEADS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts a span of a head's entries whose first DIGIT bytes are those of the last one that wins, by their next
    byte."""
    row = tl.program_id(1)
    b = row // kv_heads
    n = tl.load(facts + row * 8 + 5)
    begin = tl.program_id(0) * SPAN
    if (tl.load(floor + b) >= 0) & (tl.load(valid + b) > 0) & (begin < n):
        facts += b * kv_heads * 8
        of_row = counts + b * kv_heads * 1024
        left = tl.sum(_wanted(facts, keep + b * ke_b, ke_h, kv_heads, HEADS)[3], 0)
        left = tl.minimum(left, 2**30).to(tl.int32)
        prefix = row * 0
        for digit in tl.static_range(DIGIT):
            byte, left = _step(tl.sum(_counted(of_row, digit, kv_heads, HEADS), 0), left)
            prefix = prefix * 256 + byte
        keys += row.to(tl.int64) * stride
        found = tl.zeros([256], tl.int32)
        for start in range(begin, tl.minimum(begin + SPAN, n), BLOCK):
            key = tl.load(keys + start + tl.arange(0, BLOCK))  # n is a multiple of BLOCK
            takes_part = (key != DEAD) & (key < PROTECTED)
            order = key.to(tl.int64) - DEAD  # 0 to 2**32 - 1
            if DIGIT > 0:
                takes_part = takes_part & ((order >> (32 - 8 * DIGIT)) == prefix.to(tl.int64))
            byte_of = ((order >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
            found += tl.histogram(byte_of, 256, mask=takes_part)
        at = counts + (row * 4 + DIGIT) * 256 + tl.arange(0, 256)
        tl.atomic_add(at, found, mask=found > 0, sem="relaxed")


@triton.jit
def _share(
    facts, floor, valid, keep, ke_b, ke_h, counts, budgets, kv_heads, HEADS: tl.constexpr,
):  # fmt: skip
    """The budgets of a row's heads, as `head_budgets` in kernels/update/reference.py has them, in the same
    arithmetic."""
    b = tl.program_id(0)
    head = tl.arange(0, HEADS)
    there = head < kv_heads
    safe_part = tl.load(floor + b)
    seen, protected, budget, share = _wanted(facts + b * kv_heads * 8, keep + b * ke_b, ke_h, kv_heads, HEADS)
    if (safe_part >= 0) & (tl.load(valid + b) > 0):
        counts += b * kv_heads * 1024
        contenders = tl.where(there, seen - protected, 0)
        wanted = tl.sum(share, 0)
        left = tl.minimum(wanted, 2**30).to(tl.int32)
        won = tl.zeros([HEADS], tl.int32)
        equal = tl.zeros([HEADS], tl.int32)
        byte = tl.arange(0, 256)
        for digit in tl.static_range(4):
            mine = _counted(counts, digit, kv_heads, HEADS)
            found, left = _step(tl.sum(mine, 0), left)
            won += tl.sum(tl.where(byte[None, :] > found, mine, 0), 1)
            equal = tl.sum(tl.where(byte[None, :] == found, mine, 0), 1)
        # Those that equal the last winner: of the lower heads first.
        won += tl.minimum(tl.maximum(left - (tl.cumsum(equal, 0) - equal), 0), equal)
        won = tl.where(wanted >= tl.sum(contenders, 0), contenders, tl.where(wanted <= 0, 0, won))
        blended = won.to(tl.float64) * (1 - safe_part) + tl.floor(safe_part * share.to(tl.float64))
        whole = tl.floor(blended)
        part = blended - whole
        whole = whole.to(tl.int64)
        up = (part > 0.5) | ((part == 0.5) & (whole % 2 != 0))  # halves to the even number
        budget_now = tl.minimum(protected + whole + up.to(tl.int64), seen.to(tl.int64)).to(tl.int32)
        fits = tl.sum((there & (seen > budget)).to(tl.int32), 0) == 0
        tl.store(budgets + b * kv_heads + head, tl.where(fits, seen, budget_now), mask=there)


def share_budgets(
    keys: Tensor, facts: Tensor, floor: Tensor, valid: Tensor, keep: Tensor, budgets: Tensor, block: int
) -> None:
    """Fills in budgets (B * Hkv,) int32 in the rows that share, floor (B,) float64 >= 0, and have new tokens.

    keys (B * Hkv, stride) and facts (B * Hkv, 8) as select.py's `_plan` leaves them at its first stage, with blocks of
    `block` entries; valid (B,), keep (B, Hkv) int32.
    """
    b, hkv = keep.shape
    rows, stride = keys.shape
    heads = triton.next_power_of_2(hkv)
    counts = torch.zeros(rows, 4, 256, dtype=torch.int32, device=keys.device)
    span = max(block, 8192)
    warps = 4 if heads <= 16 else 16
    for digit in range(4):
        _count_bytes[(triton.cdiv(stride, span), rows)](
            keys, facts, floor, valid, keep, *keep.stride(), counts, stride, hkv, DIGIT=digit, HEADS=heads, SPAN=span,
            BLOCK=block, num_warps=max(warps, 8),
        )  # fmt: skip
    # Products and sums are rounded one by one (no fused multiply-add), so that results equal the reference's.
    _share[(b,)](
        facts, floor, valid, keep, *keep.stride(), counts, budgets, hkv, HEADS=heads, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _deal(
    spare, sp_b, table, ta_b, ta_h, ta_p, next_table, nt_b, nt_h, nt_p, lens, le_b, le_h, offered, width, next_width, kv_heads,
    PAGE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the page numbers of one head; see `deal`."""
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    h = row % kv_heads
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = column < next_width
    if tl.load(spare + b * sp_b) >= 0:
        head = tl.arange(0, HEADS)
        need = (tl.load(lens + b * le_b + head * le_h, mask=head < kv_heads, other=0) + PAGE - 1) // PAGE
        start = tl.sum(tl.where(head < h, need, 0), 0)
        own = tl.sum(tl.where(head == h, need, 0), 0)
        at = start + column
        page = tl.load(spare + b * sp_b + at, mask=there & (column < own) & (at < offered), other=0)
        page = tl.maximum(page, 0)  # where too few were offered: page 0, which nothing reads
    else:
        page = tl.load(table + b * ta_b + h * ta_h + column * ta_p, mask=there & (column < width), other=0)
    tl.store(next_table + b * nt_b + h * nt_h + column * nt_p, page, mask=there)


def deal(spare: Tensor, table: Tensor, next_table: Tensor, lens: Tensor, page: int) -> None:
    """Fills in next_table (B, Hkv, W'): in rows that are offered pages, spare (B, W) >= 0, one after the other to the
    heads that need them for lens (B, Hkv) slots; other rows keep those of table (B, Hkv, P)."""
    b, hkv, width = next_table.shape
    _deal[(triton.cdiv(width, 256), b * hkv)](
        spare, spare.stride(0), table, *table.stride(), next_table, *next_table.stride(), lens, *lens.stride(), spare.shape[1],
        table.shape[2], width, hkv, PAGE=page, HEADS=triton.next_power_of_2(hkv), BLOCK=256, num_warps=4,
    )  # fmt: skip


@triton.jit
def _copy_out(
    k_pages, v_pages, score_pages, pos_pages, slot_scores, ss_b, ss_h, ss_c, table, ta_b, ta_h, ta_p, spare, sp_b, sources,
    moves, k_out, v_out, score_out, pos_out, capacity, listed, kv_heads,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    RESCORE: tl.constexpr,
):  # fmt: skip
    """ROWS moves of a head per program and iteration; see `copy_out`."""
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    h = (row % kv_heads).to(tl.int64)
    if tl.load(spare + b * sp_b) >= 0:
        count = tl.minimum(tl.minimum(tl.load(moves + row * 2), tl.load(moves + row * 2 + 1)), capacity)
        sources += row.to(tl.int64) * listed
        table += b * ta_b + h * ta_h
        d = tl.arange(0, D_PAD)[None, :]
        dv = tl.arange(0, DV_PAD)[None, :]
        for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
            r = start + tl.arange(0, ROWS)
            slot = tl.load(sources + r, mask=r < count, other=-1)
            old = slot >= 0
            page = tl.load(table + (slot // PAGE) * ta_p, mask=old, other=0).to(tl.int64)
            came = page * PAGE + tl.where(old, slot, 0) % PAGE
            to = row.to(tl.int64) * capacity + r
            x = tl.load(k_pages + came[:, None] * D + d, mask=old[:, None] & (d < D))
            y = tl.load(v_pages + came[:, None] * DV + dv, mask=old[:, None] & (dv < DV))
            tl.store(k_out + to[:, None] * D + d, x, mask=old[:, None] & (d < D))
            tl.store(v_out + to[:, None] * DV + dv, y, mask=old[:, None] & (dv < DV))
            if RESCORE:
                score = tl.load(slot_scores + b * ss_b + h * ss_h + slot * ss_c, mask=old).to(tl.float32)
            else:
                score = tl.load(score_pages + came, mask=old)
            tl.store(score_out + to, score, mask=old)
            tl.store(pos_out + to, tl.load(pos_pages + came, mask=old), mask=old)


def copy_out(
    cache: Cache, slot_scores: Tensor | None, spare: Tensor, sources: Tensor, moves: Tensor, per_turn: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies the slots that are to be moved out of their pages, since those may have been dealt to other heads; in rows
    that are offered pages only. Move r of a head, sources (B * Hkv, moves), is entry r of what is returned: keys (B *
    Hkv, C, D), values, scores (slot_scores where given) and positions (B * Hkv, C, 2)."""
    k_pages, v_pages, score_pages, pos_pages, table, _ = cache
    b, hkv, width = table.shape
    page, rows, listed = k_pages.shape[1], b * hkv, sources.shape[1]
    capacity, k_dim, v_dim = width * page, k_pages.shape[2], v_pages.shape[2]
    out = (
        k_pages.new_empty(rows, capacity, k_dim), v_pages.new_empty(rows, capacity, v_dim),
        score_pages.new_empty(rows, capacity), pos_pages.new_empty(rows, capacity, 2),
    )  # fmt: skip
    slots = (score_pages, 0, 0, 0) if slot_scores is None else (slot_scores, *slot_scores.stride())
    programs = max(1, min(triton.cdiv(capacity, per_turn), 1024 // rows))
    _copy_out[(programs, rows)](
        k_pages, v_pages, score_pages, pos_pages.view(torch.int64), *slots, table, *table.stride(), spare, spare.stride(0),
        sources, moves, *out[:3], out[3].view(torch.int64), capacity, listed, hkv,
        D=k_dim, D_PAD=triton.next_power_of_2(k_dim), DV=v_dim, DV_PAD=triton.next_power_of_2(v_dim), PAGE=page, ROWS=per_turn,
        RESCORE=slot_scores is not None, num_warps=4,
    )  # fmt: skip
    return out
