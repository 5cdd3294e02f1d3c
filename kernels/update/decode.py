"""What decoding does to a paged cache after attention: one new token per row comes in, and what has no room goes.

Everything happens in place and in one launch, a program for each (row, kv head). While there is room the new token goes
after the last slot, and nothing else is read. Otherwise the slot of lowest worth is found in one pass over scores and
positions, and the new token takes its place. What is rarer (several slots go, since the budget shrank or a chunk ended;
the newest slots have gaps between them) costs more passes in the same program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvrewrite.kernels.attention.decode import check_rotation, rotated
from kvrewrite.kernels.groups import NOTHING, Cache, Eviction, NewTokens, Preceding, Rows
from kvrewrite.kernels.launch import begin, options
from kvrewrite.kernels.linear.small import activate

PAGE = 64  # slots per page
MOST_SLOTS = 1 << 21  # slots per head that the counters have room for
_PAGE = tl.constexpr(PAGE)
_FIELD = tl.constexpr(21)  # bits of each of three counters in an int64
_MASK = tl.constexpr(MOST_SLOTS - 1)
# A slot's key orders slots by what stays: first its worth, then the earlier position. Unlike priorities() in
# kernels/update/reference.py it has its own values for slots that no later query sees and for those that are not there.
_GONE = tl.constexpr(-(2**63))
_NOT_THERE = tl.constexpr(2**63 - 1)


@triton.jit
def visible_slots(pos, following, window, chunk, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Which positions the query at `following` sees."""
    seen = pos == pos
    if WINDOW:
        seen = seen & (following - pos < window)
    if CHUNK:
        seen = seen & (pos // chunk == following // chunk)
    return seen


@triton.jit
def sort_key(score, pos, seen, protected):
    """The key of slots, int64: the worth as an integer of the same order, above what is left until the last
    position."""
    worth = tl.where(score == float("inf"), 3e38, tl.where(score == float("-inf"), -3e38, score))
    worth = tl.where(score != score, -3.3e38, worth)
    worth = tl.where(worth == 0.0, 0.0, worth)  # -0 is not less than 0
    worth = tl.where(protected, float("inf"), worth)
    bits = worth.to(tl.float32).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(seen, (order.to(tl.int64) << 32) | (0x7FFFFFFF - pos).to(tl.int64), _GONE)


@triton.jit
def _pages_at(i, n, pages, table_p, PAGES: tl.constexpr):
    """Slots of PAGES pages from page i on, which of them are live, and where they lie in a pool: (PAGES, PAGE) each."""
    number = i + tl.arange(0, PAGES)
    slot = number[:, None] * _PAGE + tl.arange(0, _PAGE)[None, :]
    page = tl.load(pages + number * table_p, mask=number * _PAGE < n, other=0).to(tl.int64)
    return slot, slot < n, page[:, None] * _PAGE + tl.arange(0, _PAGE)[None, :]


@triton.jit
def _slots_at(
    i, n, pages, places, score_pages, slot_scores, select, table_p, sinks, newest_from, following, window, chunk,
    PAGES: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SLOT_SCORES: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """What is known of the slots of PAGES pages: liveness, place in a pool, positions as stored and in the text, score,
    visibility and key."""
    slot, live, at = _pages_at(i, n, pages, table_p, PAGES)
    place = tl.load(places + at, mask=live, other=0)
    pos = place.to(tl.int32)
    if SLOT_SCORES:
        score = tl.load(slot_scores + slot, mask=live, other=0.0).to(tl.float32)
    else:
        score = tl.load(score_pages + at, mask=live, other=0.0)
    by = score
    if SELECT:
        by = tl.load(select + slot, mask=live, other=0.0).to(tl.float32)
    seen = visible_slots(pos, following, window, chunk, WINDOW, CHUNK) & live
    key = tl.where(live, sort_key(by, pos, seen, (pos < sinks) | (pos >= newest_from)), _NOT_THERE)
    return live, at, place, pos, score, seen, key


@triton.jit
def _newest_bound(wanted, n, new_pos, arrives, pages, places, table_p, PAGES: tl.constexpr):
    """The position from which on there are `wanted` > 0 of the n cached slots and the new token (-1: fewer there
    are)."""
    low = tl.full((), -1, tl.int64)
    high = new_pos + tl.full((), 1, tl.int64)  # none is later than the new token
    while low + 1 < high:
        middle = (low + high) >> 1
        count = (arrives & (new_pos >= middle)).to(tl.int32)
        for i in range(0, tl.cdiv(n, _PAGE), PAGES):
            _, live, at = _pages_at(i, n, pages, table_p, PAGES)
            pos = tl.load(places + at, mask=live, other=0).to(tl.int32)
            count += tl.sum(tl.sum((live & (pos >= middle)).to(tl.int32), 1), 0)
        low = tl.where(count >= wanted, middle, low)
        high = tl.where(count >= wanted, high, middle)
    return low


@triton.jit
def _copy_slots(
    source, target, mask, k_pages, v_pages, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr
):
    """Moves keys and values between slots of the pools, in a way that allows for targets that are sources
    themselves."""
    d, e = tl.arange(0, DP), tl.arange(0, DVP)
    of_k, of_v = mask[:, None] & (d < D)[None, :], mask[:, None] & (e < DV)[None, :]
    keys = tl.load(k_pages + source[:, None] * D + d[None, :], mask=of_k, other=0.0)
    values = tl.load(v_pages + source[:, None] * DV + e[None, :], mask=of_v, other=0.0)
    tl.debug_barrier()
    tl.store(k_pages + target[:, None] * D + d[None, :], keys, mask=of_k)
    tl.store(v_pages + target[:, None] * DV + e[None, :], values, mask=of_v)


@triton.jit
def _come_nearer(n, gone_pos, newcomer_gone, pages, places, table_p, PAGES: tl.constexpr):
    """Adds one to the second position of the slots older than `gone_pos`, and to that of all where no new token
    enters."""
    for i in range(0, tl.cdiv(n, _PAGE), PAGES):
        _, live, at = _pages_at(i, n, pages, table_p, PAGES)
        place = tl.load(places + at, mask=live, other=0)
        step = (place.to(tl.int32) < gone_pos).to(tl.int64) + newcomer_gone
        tl.store(places + at, place + (step << 32), mask=live & (step > 0))


@triton.jit
def _pool_row(slot, pages, table_p):
    """Where a slot lies in a pool."""
    return tl.load(pages + (slot // _PAGE) * table_p).to(tl.int64) * _PAGE + slot % _PAGE


@triton.jit
def least_slot(
    n, real, arrives, new_seen, new_pos, budget, protect, pages, places, score_pages, slot_scores, select, table_p, sinks, window,
    chunk, PAGES: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SLOT_SCORES: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Looks at all slots, as far as that is needed, and stores slot_scores: the least key and its slot; how many cached
    slots no later query sees, how many one does, how many of these and the new token the budget has no room for; and
    the position from which on slots are protected."""
    following = new_pos + 1
    total = n + arrives.to(tl.int32)
    # The newest slots are protected, but no more of them than there is room for beside the first ones. As a rule their
    # positions have no gaps, and then the first of these positions is known beforehand.
    guess = tl.minimum(protect, tl.maximum(budget - sinks, 0))
    newest_from = new_pos - guess + 1
    may_guess = n >= 0
    look = real
    if not (WINDOW or CHUNK):
        look = real & (total > budget)
    if SLOT_SCORES:
        look = n >= 0
    least = tl.full((), _NOT_THERE, tl.int64)
    victim = n
    lost = n - n  # cached slots that no later query sees
    there = n.to(tl.int64)  # cached slots that one does
    over = tl.zeros((), tl.int64)  # how many of these and the new token the budget has no room for
    while look:
        least = tl.full((), _NOT_THERE, tl.int64)
        counts = tl.zeros((), tl.int64)
        for i in range(0, tl.cdiv(n, _PAGE), PAGES):
            live, at, _, pos, score, seen, key = _slots_at(
                i, n, pages, places, score_pages, slot_scores, select, table_p, sinks, newest_from, following, window,
                chunk, PAGES, WINDOW, CHUNK, SLOT_SCORES, SELECT,
            )  # fmt: skip
            if SLOT_SCORES:
                tl.store(score_pages + at, score, mask=live)
            counted = seen.to(tl.int64) | ((seen & (pos < sinks)).to(tl.int64) << _FIELD)
            counted = counted | ((live & (pos >= newest_from)).to(tl.int64) << (2 * _FIELD))
            counts += tl.sum(tl.sum(counted, 1), 0)
            low = tl.min(tl.min(key, 1), 0)
            if low < least:
                least = low
                found = tl.where(key == low, i * _PAGE + tl.arange(0, PAGES * _PAGE).reshape(PAGES, _PAGE), -1)
                victim = tl.max(tl.max(found, 1), 0)
        there = counts & _MASK
        lost = n - there.to(tl.int32)
        over = tl.maximum(there + new_seen.to(tl.int64) - budget, 0)
        first = ((counts >> _FIELD) & _MASK) + (new_seen & (new_pos < sinks)).to(tl.int64)
        newest = (counts >> (2 * _FIELD)) + (arrives & (new_pos >= newest_from)).to(tl.int64)
        safe = tl.minimum(protect, tl.maximum(budget - first, 0))
        look = real & may_guess & (over > 0) & ((safe != guess) | (newest != tl.minimum(safe, total)))
        if look:
            may_guess = n < 0
            newest_from = new_pos + tl.full((), 1, tl.int64)
            if safe > 0:
                newest_from = _newest_bound(safe, n, new_pos, arrives, pages, places, table_p, PAGES)
    return least, victim, lost, there, over, newest_from


@triton.jit
def eviction_cut(
    n, new_seen, new_key, budget, over, newest_from, new_pos, pages, places, score_pages, slot_scores, select, table_p, sinks,
    window, chunk, PAGES: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SLOT_SCORES: tl.constexpr,
    SELECT: tl.constexpr,
):  # fmt: skip
    """What stays has keys of at least this: with too many, the budget-th highest, found bit by bit."""
    following = new_pos + 1
    cut = tl.full((), _GONE + 1, tl.int64)
    if over > 0:
        cut = tl.full((), _GONE, tl.int64)
        for bit in range(64):
            trial = cut ^ (tl.full((), 1, tl.int64) << (63 - bit))
            above = (new_seen & (new_key >= trial)).to(tl.int32)
            for i in range(0, tl.cdiv(n, _PAGE), PAGES):
                live, _, _, _, _, _, key = _slots_at(
                    i, n, pages, places, score_pages, slot_scores, select, table_p, sinks, newest_from, following, window,
                    chunk, PAGES, WINDOW, CHUNK, SLOT_SCORES, SELECT,
                )  # fmt: skip
                above += tl.sum(tl.sum((live & (key >= trial)).to(tl.int32), 1), 0)
            cut = tl.where(above >= budget, trial, cut)
    return cut


@triton.jit(
    do_not_specialize=[
        "sinks", "window", "chunk", "k_b", "k_h", "v_b", "v_h", "new_b", "new_h", "slots_b", "slots_h", "pos_b", "rot_b",
        "keep_b", "keep_h", "table_b", "table_h", "lens_b", "lens_h", "select_b", "select_h", "drop_b", "drop_h",
        "cos_b", "sin_b",
    ]
)  # fmt: skip
def _update_kernel(
    k, v, new_scores, head_weight, slot_scores, positions, rotary, valid, keep, recent, k_pages, v_pages, score_pages, places,
    table, lens, select, drop, cos, sin, sinks, window, chunk, capacity, cos_b, sin_b,
    k_b, k_h, v_b, v_h, new_b, new_h, slots_b, slots_h, pos_b, rot_b, keep_b, keep_h, table_b, table_h, table_p, lens_b,
    lens_h, select_b, select_h, drop_b, drop_h,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, PAGES: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SLOT_SCORES: tl.constexpr, SELECT: tl.constexpr, DROP: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_P: tl.constexpr, ACTIVATION: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """HIDDEN > 0: new_scores is the hidden layer of a head of that width, (B, ., HIDDEN), from which the scores are
    made."""
    head = tl.program_id(0)
    b = (head // HKV).to(tl.int64)
    h = head % HKV
    if HIDDEN > 0:
        unit = tl.arange(0, HIDDEN_P)
        row_of_head = tl.load(head_weight + h * HIDDEN + unit, mask=unit < HIDDEN, other=0.0)
    begin(PDL)
    pages = table + b * table_b + h * table_h
    slot_scores += b * slots_b + h * slots_h
    select += b * select_b + h * select_h
    n = tl.load(lens + b * lens_b + h * lens_h)
    real = tl.load(valid + b) > 0
    budget = tl.load(keep + b * keep_b + h * keep_h).to(tl.int64)
    protect = tl.load(recent + b).to(tl.int64)
    new_pos = tl.load(positions + b * pos_b).to(tl.int32)
    if HIDDEN > 0:
        hidden = tl.load(new_scores + b * new_b + unit, mask=unit < HIDDEN, other=0.0)
        active = activate(hidden.to(tl.float32), ACTIVATION).to(hidden.dtype)
        new_score = tl.sum(active.to(tl.float32) * row_of_head.to(tl.float32), 0).to(hidden.dtype).to(tl.float32)
    else:
        new_score = tl.load(new_scores + b * new_b + h * new_h).to(tl.float32)
    arrives = real
    if DROP:
        arrives = real & (tl.load(drop + b * drop_b + h * drop_h) == 0)
    following = new_pos + 1
    new_seen = arrives & visible_slots(new_pos, following, window, chunk, WINDOW, CHUNK)

    least, victim, lost, there, over, newest_from = least_slot(
        n, real, arrives, new_seen, new_pos, budget, protect, pages, places, score_pages, slot_scores, select, table_p, sinks,
        window, chunk, PAGES, WINDOW, CHUNK, SLOT_SCORES, SELECT,
    )  # fmt: skip

    if real:
        by = new_score
        if SELECT:
            by = tl.load(select + capacity).to(tl.float32)
        new_key = sort_key(by, new_pos, new_seen, (new_pos < sinks) | (new_pos >= newest_from))
        tl.debug_barrier()  # everything has been read, and slot_scores stored, before something is written
        going = lost + over
        stays = new_seen
        to = n  # the new token's slot
        count = n  # cached slots that stay
        if going == 1:
            if (lost == 0) & new_seen & (new_key <= least):
                stays = n < 0
                if RANKS:
                    _come_nearer(n, -1, 1, pages, places, table_p, PAGES)
                    tl.debug_barrier()
            else:
                to = victim
                count = n - 1
                if RANKS:
                    gone_pos = tl.load(places + _pool_row(victim, pages, table_p)).to(tl.int32)
                    tl.debug_barrier()
                    gone = 1 - stays.to(tl.int64)
                    _come_nearer(n, gone_pos, gone, pages, places, table_p, PAGES)
                    tl.debug_barrier()
                if (stays == 0) & (victim < count):
                    # Nobody comes in: the last slot fills the gap.
                    one = tl.zeros([1], tl.int64)
                    source = _pool_row(count, pages, table_p)
                    target = _pool_row(victim, pages, table_p)
                    _copy_slots(one + source, one + target, one == 0, k_pages, v_pages, D, DV, DP, DVP)
                    tl.store(places + target, tl.load(places + source))
                    tl.store(score_pages + target, tl.load(score_pages + source))
        elif going > 1:
            cut = eviction_cut(
                n, new_seen, new_key, budget, over, newest_from, new_pos, pages, places, score_pages, slot_scores, select,
                table_p, sinks, window, chunk, PAGES, WINDOW, CHUNK, SLOT_SCORES, SELECT,
            )  # fmt: skip
            stays = new_seen & (new_key >= cut)
            if RANKS:
                # Slots that go, one by one from the newest; there are few of them, as a rule.
                gone = 1 - stays.to(tl.int64)
                below = new_pos
                while below >= 0:
                    newest_gone = tl.full((), -1, tl.int32)
                    for i in range(0, tl.cdiv(n, _PAGE), PAGES):
                        live, _, _, pos, _, _, key = _slots_at(
                            i, n, pages, places, score_pages, slot_scores, select, table_p, sinks, newest_from, following,
                            window, chunk, PAGES, WINDOW, CHUNK, SLOT_SCORES, SELECT,
                        )  # fmt: skip
                        found_gone = tl.where(live & (key < cut) & (pos < below), pos, -1)
                        newest_gone = tl.maximum(newest_gone, tl.max(tl.max(found_gone, 1), 0))
                    below = tl.where(there > 0, newest_gone, -1)
                    tl.debug_barrier()
                    _come_nearer(n, below, gone, pages, places, table_p, PAGES)
                    tl.debug_barrier()
                    gone = gone * 0
            count = n - n
            if there > 0:
                for i in range(tl.cdiv(n, _PAGE)):
                    live, at, place, _, score, _, key = _slots_at(
                        i, n, pages, places, score_pages, slot_scores, select, table_p, sinks, newest_from, following,
                        window, chunk, 1, WINDOW, CHUNK, SLOT_SCORES, SELECT,
                    )  # fmt: skip
                    kept = tl.reshape(live & (key >= cut), [_PAGE])
                    at = tl.reshape(at, [_PAGE])
                    target = count + tl.cumsum(kept.to(tl.int32), 0) - 1
                    moved = kept & (target != i * _PAGE + tl.arange(0, _PAGE))
                    page = tl.load(pages + (target // _PAGE) * table_p, mask=moved, other=0).to(tl.int64)
                    target = page * _PAGE + target % _PAGE
                    _copy_slots(at, target, moved, k_pages, v_pages, D, DV, DP, DVP)
                    tl.store(places + target, tl.reshape(place, [_PAGE]), mask=moved)
                    tl.store(score_pages + target, tl.reshape(score, [_PAGE]), mask=moved)
                    count += tl.sum(kept.to(tl.int32), 0)
                tl.debug_barrier()
            to = count
        if RANKS:  # noqa: SIM102 (decided when compiling)
            if (going <= 0) & (stays == 0):  # a new token that is dropped
                _come_nearer(n, -1, 1, pages, places, table_p, PAGES)
        if stays:
            d, e = tl.arange(0, DP), tl.arange(0, DVP)
            row = _pool_row(to, pages, table_p)
            key_row = rotated(k + b * k_b + h * k_h, d, cos + b * cos_b, sin + b * sin_b, d < D, HALF)
            value_row = tl.load(v + b * v_b + h * v_h + e, mask=e < DV, other=0.0)
            tl.store(k_pages + row * D + d, key_row.to(k_pages.dtype.element_ty), mask=d < D)
            tl.store(v_pages + row * DV + e, value_row.to(v_pages.dtype.element_ty), mask=e < DV)
            tl.store(score_pages + row, new_score)
            turned = tl.load(rotary + b * rot_b).to(tl.int32)  # with RANKS its position, too
            tl.store(places + row, (turned.to(tl.int64) << 32) | new_pos.to(tl.int64))
        tl.store(lens + b * lens_b + h * lens_h, count + stays.to(tl.int32))


def decode_update(
    new: NewTokens,
    rows: Rows,
    cache: Cache,
    eviction: Eviction,
    preceding: Preceding = NOTHING,
    ranks: bool = False,
) -> None:
    """`kvrewrite::cache_update` for one new token per row, in heads that neither share budgets nor merge slots.

    k, v, slot_scores and select: last dim contiguous. The positions of a head's slots are
    different from one another, not negative, and earlier than the new token's.

    head: (Hkv, W), contiguous, in the model's dtype: then new_scores (B, 1, W), last dim contiguous, is the hidden
    layer of a retaining head before its `activation` ("silu", "gelu", "gelu_tanh"), and scores are act(new_scores)
    head^T, rounded to that dtype after both. cos, sin: (B, 1, D), as `decode_attention` takes them: then k is not
    rotated yet, and is cached rotated. ranks: as `kvrewrite::token_update` has it; rotary is then positions.

    The set of slots that stay is exactly the reference's, their order is not: a new token takes its victim's place.
    Changes the pools and lens, and nothing else in them than what that needs. There must be a page for the new token
    where it goes after the last slot.
    """
    k, v, new_scores, slot_scores = new
    positions, rotary, valid, keep, recent = rows
    k_pages, v_pages, score_pages, pos_pages, table, lens = cache
    first, window, chunk, select, drop = eviction
    head, activation, cos, sin = preceding
    b, hkv, t, d = k.shape
    dv, capacity = v.shape[3], table.shape[2] * PAGE
    if t != 1:
        raise ValueError(f"decode_update takes one token per row, got {t}")
    if k_pages.shape[1] != PAGE:
        raise ValueError(f"decode_update takes pages of {PAGE} slots, got {k_pages.shape[1]}")
    if capacity >= MOST_SLOTS:
        raise ValueError(f"decode_update takes fewer than {MOST_SLOTS} slots per head, got room for {capacity}")
    check_rotation(k, cos, sin)
    if not b * hkv:
        return
    width = 0
    if head is not None:
        width = head.shape[1]
        if (
            new_scores.shape != (b, 1, width)
            or head.shape[0] != hkv
            or not head.is_contiguous()
            or new_scores.stride(2) != 1
        ):
            shapes = f"{tuple(new_scores.shape)} and {tuple(head.shape)}"
            raise ValueError(f"decode_update: hidden layer and head are {shapes}, expected ({b}, 1, W) and ({hkv}, W)")
        if new_scores.dtype != head.dtype:
            raise ValueError(
                f"decode_update: hidden layer in {new_scores.dtype}, head in {head.dtype}, expected one dtype"
            )
    by_slot, chosen = score_pages if slot_scores is None else slot_scores, score_pages if select is None else select
    dropped = valid if drop is None else drop.view(torch.uint8)
    turn, turn_s = (k, k) if cos is None or sin is None else (cos, sin)
    block = max(256, min(8192, triton.next_power_of_2(capacity)))
    _update_kernel[(b * hkv,)](
        k, v, new_scores, head, by_slot, positions, rotary, valid.contiguous(), keep, recent.contiguous(), k_pages, v_pages,
        score_pages, pos_pages.view(torch.int64), table, lens, chosen, dropped, turn, turn_s, first, window, chunk,
        capacity, turn.stride(0), turn_s.stride(0),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), new_scores.stride(0), new_scores.stride(1),
        by_slot.stride(0), by_slot.stride(1), positions.stride(0), rotary.stride(0), keep.stride(0), keep.stride(1),
        table.stride(0), table.stride(1), table.stride(2), lens.stride(0), lens.stride(1),
        chosen.stride(0), chosen.stride(1), dropped.stride(0), 0 if drop is None else dropped.stride(1),
        HKV=hkv, D=d, DV=dv, DP=max(16, triton.next_power_of_2(d)), DVP=max(16, triton.next_power_of_2(dv)),
        PAGES=block // PAGE, WINDOW=window > 0, CHUNK=chunk > 0, SLOT_SCORES=slot_scores is not None,
        SELECT=select is not None, DROP=drop is not None, HIDDEN=width, HIDDEN_P=triton.next_power_of_2(max(1, width)),
        ACTIVATION=activation, HALF=0 if cos is None else d // 2, RANKS=ranks, num_warps=max(4, block // 256),
        **options(k.device),
    )  # fmt: skip
