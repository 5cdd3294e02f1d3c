"""Append, select and compact on the GPU: `kvrewrite::cache_update` without merging.

Three launches. `_plan` has one program for each (row, kv head): it finds the worth of the last entry that stays (the
threshold). `_lists` writes down which entries move to which slots, and `_move` copies those, many programs per head.
Survivors that already lie below the new length stay where they are; the others fill the slots that victims leave, so
that sources and destinations never overlap and, once the cache is full, only new tokens that win are moved. The order
of slots is free.

Worth is compared as int32 keys in the order of the fp32 scores: NaN lowest, -0.0 equal to 0.0, protected entries above
and dead or invisible ones below all. The threshold is found by quartering the interval of keys: a pass counts the
entries above three pivots. Once the interval holds few entries they are compared with one another. Of entries that
equal the threshold the earliest positions stay; if they are many, the same search is done over their positions.

Entries of a head in scratch memory: its slots from 0 on, new tokens from `behind`, the length rounded up to a block,
on.

Ragged evictions (ragged.py): in rows that share budgets `_plan` runs twice, for the worth of all entries and, once the
heads' budgets are known, for the rest. In rows that are dealt new pages every entry that stays is listed; slots are
copied out of their pages first, since those may be dealt to other heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.groups import EQUAL, Cache, Eviction, NewTokens, Ragged, Rows
from kvrewrite.kernels.update.ragged import copy_out, deal, share_budgets

DEAD = tl.constexpr(-(2**31))
PROTECTED = tl.constexpr(0x7F800000)  # the key of +inf, which no score has: infinite scores count as finite
LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def _count(a, n, p1, p2, p3, BLOCK: tl.constexpr):
    """How many of the n int32 at a (n a multiple of BLOCK, below 2**21) are at least p1, p2 and p3."""
    c1 = tl.zeros([BLOCK], tl.int32)
    c2 = tl.zeros([BLOCK], tl.int32)
    c3 = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        x = tl.load(a + start + tl.arange(0, BLOCK))
        c1 += (x >= p1).to(tl.int32)
        c2 += (x >= p2).to(tl.int32)
        c3 += (x >= p3).to(tl.int32)
    # One reduction for the three: its barriers are most of a short pass.
    all3 = tl.sum(c1.to(tl.int64) + (c2.to(tl.int64) << 21) + (c3.to(tl.int64) << 42), 0)
    low = 2**21 - 1
    return (all3 & low).to(tl.int32), ((all3 >> 21) & low).to(tl.int32), (all3 >> 42).to(tl.int32)


@triton.jit
def _search(a, n, k, low, high, n_low, n_high, grain, few, BLOCK: tl.constexpr):
    """Narrows [low, high), int64, around the k-th largest of the n int32 at a; n_low > k > n_high are the numbers of
    entries >= low and >= high. All entries in question are multiples of `grain`, a power of two, as are low and high.

    Ends when n_low == k; or when all entries in the interval equal low; or when it holds no more than `few` of them.
    """
    p1 = low + grain  # first of all: is it the lowest that goes?
    while (n_low > k) & (high - low > grain) & (n_low - n_high > few):
        width = high - low
        p2 = low + tl.maximum((width >> 1) & -grain, grain)
        p3 = low + tl.maximum(((width >> 2) * 3) & -grain, grain)
        c1, c2, c3 = _count(a, n, p1.to(tl.int32), p2.to(tl.int32), p3.to(tl.int32), BLOCK)
        # low < p1 <= p2 <= p3 < high: the last pivot with enough entries above, and the first one with too few.
        low, n_low = tl.where(c1 >= k, p1, low), tl.where(c1 >= k, c1, n_low)
        low, n_low = tl.where(c2 >= k, p2, low), tl.where(c2 >= k, c2, n_low)
        low, n_low = tl.where(c3 >= k, p3, low), tl.where(c3 >= k, c3, n_low)
        high, n_high = tl.where(c3 < k, p3, high), tl.where(c3 < k, c3, n_high)
        high, n_high = tl.where(c2 < k, p2, high), tl.where(c2 < k, c2, n_high)
        high, n_high = tl.where(c1 < k, p1, high), tl.where(c1 < k, c1, n_high)
        p1 = low + tl.maximum(((high - low) >> 2) & -grain, grain)
    return low, high, n_low, n_high


@triton.jit
def _key(score, live, pos, following, newest_from, SINKS: tl.constexpr, window, chunk, MASKED: tl.constexpr):
    """The key of each entry, and which are visible to later queries. Protected: positions < SINKS or >= newest_from."""
    # As the reference has it: NaN, -inf and inf take their places among the finite numbers.
    score = tl.where(score == float("inf"), 3e38, score)
    score = tl.where(score == float("-inf"), -3e38, score)
    score = tl.where(score != score, -3.3e38, score)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -bits + DEAD, bits)  # trailing zeros survive, and -0.0 becomes 0.0
    key = tl.where(pos >= newest_from, PROTECTED, key)
    if SINKS > 0:
        key = tl.where(pos < SINKS, PROTECTED, key)
    visible = live
    if MASKED:
        visible = visible & ((window == 0) | (following - pos < window))
        block = tl.maximum(chunk, 1)
        visible = visible & ((chunk == 0) | (pos // block == following // block))
    return tl.where(visible, key, DEAD), visible


@triton.jit
def _note(key, live, visible, pos, newest_from, state, SINKS: tl.constexpr, MASKED: tl.constexpr):
    """Adds a block to the running facts about a head, entry by entry; see `_plan`. Two counts share an int32."""
    live_and_seen, first_and_newest, protected, least, most, bits = state
    live_and_seen += live.to(tl.int32)
    if MASKED:
        live_and_seen += visible.to(tl.int32) << 16
    if SINKS > 0:
        first_and_newest += (visible & (pos < SINKS)).to(tl.int32)
    first_and_newest += (live & (pos >= newest_from)).to(tl.int32) << 16
    guarded = key == PROTECTED
    protected += guarded.to(tl.int32)
    least = tl.minimum(least, tl.where(visible, key, LARGEST))
    most = tl.maximum(most, tl.where(guarded, DEAD, key))
    return live_and_seen, first_and_newest, protected, least, most, bits | key


@triton.jit
def _plan(
    new_scores, ns_b, ns_h, ns_t, slot_scores, ss_b, ss_h, ss_c, select, se_b, se_h, se_n, drop, dr_b, dr_h, dr_t,
    positions, po_b, po_t, valid, keep, ke_b, ke_h, recent, score_pages, pos_pages, table, ta_b, ta_h, ta_p,
    lens, le_b, le_h, keys, places, indices, orders, filled, facts, sources, targets, moves, floor, budgets, spare, sp_b,
    stride, capacity, room, listed, tokens, kv_heads, window, chunk,
    SINKS: tl.constexpr, MASKED: tl.constexpr, RESCORE: tl.constexpr, SELECT: tl.constexpr, DROP: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, DEAL: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Which entries of one head stay, as facts for `_lists`: entry i stays if keys[i] >= threshold. Writes lens, and
    slot_scores to their pages. Where all stay, the moves are listed at once: sources[r] goes to slot targets[r], r <
    both moves; a source is a slot, or -1 - t for new token t. Both lists have room for `listed` moves per head.

    STAGE 0: all at once. With budgets that are shared where floor (B,) is not negative: 1: the worth of entries, and
    facts for ragged.py; 2: the rest, with the (B, Hkv) `budgets` in those rows. DEAL: rows whose first spare page is
    not negative move to pages with `room` slots per head.

    keys, places: int32 scratch, `stride` per head: worth and position of entries. indices, orders: TAIL per head, for
    entries near the threshold; filled: their number. pos_pages: seen as int64, the position in the lower half.
    """
    row = tl.program_id(0)
    b = (row // kv_heads).to(tl.int64)
    h = (row % kv_heads).to(tl.int64)
    keys += row.to(tl.int64) * stride
    places += row.to(tl.int64) * stride
    indices += row.to(tl.int64) * TAIL
    orders += row.to(tl.int64) * TAIL
    facts += row * 8
    sources += row.to(tl.int64) * listed
    targets += row.to(tl.int64) * listed
    new_scores += b * ns_b + h * ns_h
    slot_scores += b * ss_b + h * ss_h
    select += b * se_b + h * se_h
    drop += b * dr_b + h * dr_h
    positions += b * po_b
    table += b * ta_b + h * ta_h
    lens += b * le_b + h * le_h
    length = tl.load(lens)
    arriving = tl.minimum(tl.load(valid + b).to(tl.int32), tokens)
    budget = tl.maximum(tl.load(keep + b * ke_b + h * ke_h).to(tl.int32), 0)
    protect = tl.load(recent + b).to(tl.int32)
    newest = tl.load(positions + tl.maximum(arriving - 1, 0) * po_t).to(tl.int32)
    tl.debug_barrier()  # everyone has read the length before it is written
    behind = (length + BLOCK - 1) // BLOCK * BLOCK
    rows_of_page = tl.arange(0, BLOCK // PAGE)
    in_page = tl.arange(0, PAGE)
    tile = rows_of_page[:, None] * PAGE + in_page[None, :]
    entry = tl.arange(0, BLOCK)

    # Nothing goes if there are no new tokens, or if there is room for all.
    append = arriving <= 0
    if not MASKED and not DROP:
        append = append | (budget - arriving >= length)
    shares = length * 0
    if STAGE > 0:
        shares = ((tl.load(floor + b) >= 0) & (arriving > 0)).to(tl.int32)
        append = append & (shares == 0)
    dealt = length * 0
    if DEAL:
        dealt = (tl.load(spare + b * sp_b) >= 0).to(tl.int32)
    most = tl.where(dealt > 0, room, capacity)
    if append & (STAGE == 1):
        tl.store(facts + 5, 0)
    elif append:
        stays = tl.where(dealt > 0, 0, length)  # slots that need no move
        if RESCORE:
            for start in range(0, stays, BLOCK):
                page = start // PAGE + rows_of_page
                slot = page[:, None] * PAGE + in_page[None, :]
                base = tl.load(table + page * ta_p, mask=page * PAGE < length, other=0).to(tl.int64) * PAGE
                score = tl.load(slot_scores + slot * ss_c, mask=slot < length, other=0.0).to(tl.float32)
                tl.store(score_pages + base[:, None] + in_page[None, :], score, mask=slot < length)
        count = tl.maximum(tl.minimum(arriving, most - length), 0) + length - stays
        for start in range(0, count, BLOCK):
            r = start + tile
            tl.store(sources + r, tl.where(r + stays < length, r, length - stays - 1 - r), mask=r < count)
            tl.store(targets + r, stays + r, mask=r < count)
        tl.store(moves + row * 2, count)
        tl.store(moves + row * 2 + 1, count)
        for i in tl.static_range(6):
            tl.store(facts + i, 0)  # nothing is left to be listed
        tl.store(lens, stays + count)
    else:
        n = behind + (tokens + BLOCK - 1) // BLOCK * BLOCK
        n_seen = length
        n_protected = length
        least = length
        most_worth = length
        grain = length
        if STAGE == 2:
            least, most_worth, grain = tl.load(facts), tl.load(facts + 1), tl.load(facts + 2)
            n_seen, n_protected = tl.load(facts + 3), tl.load(facts + 4)
            budget = tl.where(shares > 0, tl.load(budgets + row), budget)
            tl.debug_barrier()  # everyone has read the facts before they are written
        if STAGE != 2:
            following = newest + 1
            # Most often the newest are consecutive, so that their first position is known beforehand. If it is not
            # that, it is searched for and everything is done once more.
            newest_from = following - tl.minimum(protect, tl.maximum(budget - SINKS, 0))
            rounds = length * 0
            while rounds < 2:
                zero = tl.zeros([BLOCK // PAGE, PAGE], tl.int32)
                state = (zero, zero, zero, zero + LARGEST, zero + DEAD, zero)
                for start in range(0, behind, BLOCK):
                    page = start // PAGE + rows_of_page
                    slot = page[:, None] * PAGE + in_page[None, :]
                    live = slot < length
                    # Pages are read as a whole, so that accesses are wide; dead slots in them are masked out
                    # afterwards.
                    base = tl.load(table + page * ta_p, mask=page * PAGE < length, other=0).to(tl.int64) * PAGE
                    used = (page * PAGE < length)[:, None]
                    address = base[:, None] + in_page[None, :]
                    pos = tl.load(pos_pages + address, mask=used, other=0).to(tl.int32)
                    if RESCORE:
                        score = tl.load(slot_scores + slot * ss_c, mask=used, other=0.0).to(tl.float32)
                        tl.store(score_pages + address, score, mask=slot < tl.where(dealt > 0, 0, length))
                    elif not SELECT:
                        score = tl.load(score_pages + address, mask=used, other=0.0)
                    if SELECT:
                        score = tl.load(select + slot * se_n, mask=used, other=0.0).to(tl.float32)
                    key, visible = _key(score, live, pos, following, newest_from, SINKS, window, chunk, MASKED)
                    tl.store(keys + slot, key)
                    tl.store(places + slot, tl.where(live, pos, -1))
                    state = _note(key, live, visible, pos, newest_from, state, SINKS, MASKED)
                for start in range(0, n - behind, BLOCK):
                    token = start + tile
                    live = token < arriving
                    there = token < tokens
                    if DROP:
                        live = live & (tl.load(drop + token * dr_t, mask=there, other=1) == 0)
                    pos = tl.load(positions + token * po_t, mask=there, other=0).to(tl.int32)
                    if SELECT:
                        score = tl.load(select + (capacity + token) * se_n, mask=there, other=0.0).to(tl.float32)
                    else:
                        score = tl.load(new_scores + token * ns_t, mask=there, other=0.0).to(tl.float32)
                    key, visible = _key(score, live, pos, following, newest_from, SINKS, window, chunk, MASKED)
                    tl.store(keys + behind + token, key)
                    tl.store(places + behind + token, tl.where(live, pos, -1))
                    state = _note(key, live, visible, pos, newest_from, state, SINKS, MASKED)
                tl.debug_barrier()
                n_live = length + arriving
                if DROP:
                    n_live = tl.sum(state[0] & 0xFFFF)
                n_seen = n_live
                if MASKED:
                    n_seen = tl.sum(state[0] >> 16)
                n_first = length * 0
                if SINKS > 0:
                    n_first = tl.sum(state[1] & 0xFFFF)
                n_protected = tl.sum(state[2])
                n_newest = n_protected
                if (SINKS > 0) or MASKED:
                    n_newest = tl.sum(state[1] >> 16)
                least = tl.min(state[3])
                most_worth = tl.max(state[4])
                lowest_bit = state[5] & -state[5]
                grain = tl.min(tl.where(lowest_bit <= 0, 1 << 30, lowest_bit))
                # The newest that are protected may not push each other out: beside the first ones there is room for so
                # many.
                safe = tl.minimum(tl.minimum(protect, tl.maximum(budget - n_first, 0)), n_live)
                rounds += tl.where(n_newest == safe, 2, 1)
                if rounds < 2:
                    whole = (length * 0).to(tl.int64)
                    found, _, _, _ = _search(
                        places, n, safe, whole, whole + LARGEST, n_live, length * 0, whole + 1, 0, BLOCK
                    )
                    # Nobody is protected, or everybody, or those from a position on.
                    newest_from = tl.where(safe <= 0, LARGEST, tl.where(safe >= n_live, 0, found)).to(tl.int32)
        if STAGE == 1:
            tl.store(facts, least)
            tl.store(facts + 1, most_worth)
            tl.store(facts + 2, grain)
            tl.store(facts + 3, n_seen)
            tl.store(facts + 4, n_protected)
            tl.store(facts + 5, n)
        if STAGE != 1:
            kept = tl.minimum(budget, n_seen)
            step = grain.to(tl.int64)
            # A threshold that needs no search: everything visible stays, or nothing, or none but protected ones.
            low, high, n_low, n_high = least.to(tl.int64), most_worth.to(tl.int64) + step, n_seen, n_protected
            if n_seen <= budget:
                low, n_low = low * 0 + (DEAD + 1), kept
            elif kept <= 0:
                low, n_low = low * 0 + LARGEST, kept
            elif n_protected >= kept:
                low, high, n_low, n_high = low * 0 + PROTECTED, low * 0 + PROTECTED + step, n_protected, n_protected * 0
            low, high, n_low, n_high = _search(keys, n, kept, low, high, n_low, n_high, step, TAIL, BLOCK)
            if n_low > kept:
                tail = tl.arange(0, TAIL)
                if n_low - n_high <= TAIL:
                    near = n_low - n_high
                    tl.store(filled + row, 0)
                    tl.debug_barrier()
                    smallest, largest = low.to(tl.int32), (high - 1).to(tl.int32)
                    for start in range(0, n, BLOCK):
                        key = tl.load(keys + start + entry)
                        inside = (key >= smallest) & (key <= largest)
                        # In any order: nothing that follows depends on it.
                        rank = tl.atomic_add(filled + row + entry * 0, 1, mask=inside, sem="relaxed")
                        tl.store(indices + rank, start + entry, mask=inside)
                    tl.debug_barrier()
                    # Each is compared with all: worth in the upper half of an int64, the earlier position above the
                    # later one.
                    index = tl.load(indices + tail, mask=tail < near, other=0)
                    key = tl.load(keys + index).to(tl.int64)
                    order = (key << 32) + (-tl.load(places + index)).to(tl.int64) + LARGEST
                    order = tl.where(tail < near, order, key * 0 + (-(2**63)))
                    tl.store(orders + tail, order)
                    tl.debug_barrier()
                    above = tl.zeros([TAIL, 32], tl.int32)
                    for start in range(0, TAIL, 32):
                        above += (tl.load(orders + start + tl.arange(0, 32))[None, :] > order[:, None]).to(tl.int32)
                    goes = (tail < near) & (tl.sum(above, 1) >= kept - n_high)
                    tl.store(keys + index, tl.full([TAIL], DEAD, tl.int32), mask=goes)
                else:
                    # Too many are equal to the threshold: n_low - kept of those go, the latest ones.
                    latest = length * 0
                    for start in range(0, n, BLOCK):
                        equal = tl.load(keys + start + entry) == low.to(tl.int32)
                        pos = tl.where(equal, tl.load(places + start + entry, mask=equal, other=-1), -1)
                        tl.store(places + start + entry, pos)
                        latest = tl.maximum(latest, tl.max(pos, 0))
                    tl.debug_barrier()
                    end, _, _, _ = _search(
                        places, n, n_low - kept, low * 0, latest.to(tl.int64) + 1, n_low - n_high, n_low * 0, low * 0 + 1, 0,
                        BLOCK,
                    )  # fmt: skip
                    for start in range(0, n, BLOCK):
                        goes = tl.load(places + start + entry) >= end.to(tl.int32)
                        tl.store(keys + start + entry, tl.full([BLOCK], DEAD, tl.int32), mask=goes)

            slots = tl.minimum(kept, most)
            # As `_lists` reads them.
            tl.store(facts, low.to(tl.int32))
            tl.store(facts + 1, slots)
            tl.store(facts + 2, tl.where(dealt > 0, 0, tl.minimum(behind, kept)))
            tl.store(facts + 3, behind)
            tl.store(facts + 4, n)
            tl.store(facts + 5, dealt)
            tl.store(moves + row * 2, 0)
            tl.store(moves + row * 2 + 1, 0)
            tl.store(lens, slots)


@triton.jit
def _flags(keys, i, start, end, threshold, behind, dealt, FREE: tl.constexpr):
    key = tl.load(keys + i, mask=i < end, other=0)
    if FREE:
        flags = (key < threshold) | (i >= behind) | (dealt > 0)
    else:
        flags = key >= threshold
    return (flags & (i >= start) & (i < end)).to(tl.int32)


@triton.jit
def _enumerate(out, total, keys, start, end, threshold, behind, dealt, listed, FREE: tl.constexpr, SPAN: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Lists a span of [start, end) at out: slots that may be filled (FREE), or entries that stay; at `total`, how many
    there are in all. Those before the span are counted once more by each program, so that no program waits for
    another."""
    first = start // SPAN * SPAN
    mine = first + tl.program_id(0) * SPAN
    if mine < end:
        counts = tl.zeros([BLOCK], tl.int32)
        for block in range(first // BLOCK * BLOCK, mine, BLOCK):
            counts += _flags(keys, block + tl.arange(0, BLOCK), start, mine, threshold, behind, dealt, FREE)
        i = mine + tl.arange(0, SPAN)
        flags = _flags(keys, i, start, end, threshold, behind, dealt, FREE)
        before = tl.sum(counts, 0)
        rank = before + tl.cumsum(flags, 0) - 1
        if FREE:
            tl.store(out + rank, i, mask=flags > 0)
        else:
            tl.store(out + rank, tl.where(i < behind, i, behind - 1 - i), mask=(flags > 0) & (rank < listed))
        if mine + SPAN >= end:
            tl.store(total, before + tl.sum(flags, 0))


@triton.jit
def _lists(keys, facts, sources, targets, moves, stride, listed, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """The moves of a head from what `_plan` found out: slots below the new length without an entry that stays are
    filled, in order, with the entries that stay and lie after it; see `_plan` for the form. Of a head that is dealt new
    pages, all slots and all entries that stay."""
    row = tl.program_id(1)
    keys += row.to(tl.int64) * stride
    facts += row * 8
    threshold, slots = tl.load(facts), tl.load(facts + 1)
    first, behind, n, dealt = tl.load(facts + 2), tl.load(facts + 3), tl.load(facts + 4), tl.load(facts + 5)
    base = row.to(tl.int64) * listed
    if tl.program_id(2) == 0:
        _enumerate(targets + base, moves + row * 2, keys, 0, slots, threshold, behind, dealt, listed, True, SPAN, BLOCK)
    else:
        _enumerate(
            sources + base, moves + row * 2 + 1, keys, first, n, threshold, behind, dealt, listed, False, SPAN, BLOCK
        )


@triton.jit
def _move(
    k, k_b, k_h, k_t, v, v_b, v_h, v_t, new_scores, ns_b, ns_h, ns_t, positions, po_b, po_t, rotary, ro_b, ro_t,
    k_pages, v_pages, score_pages, pos_pages, table, ta_b, ta_h, ta_p, sources, targets, moves, listed, kv_heads,
    spare, sp_b, next_table, nt_b, nt_h, nt_p, k_out, v_out, score_out, pos_out, capacity,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    DEAL: tl.constexpr,
):  # fmt: skip
    """Carries out the moves of a head that `_plan` has listed: ROWS of them per program and iteration.

    DEAL: they go to the pages of next_table; in rows that are dealt new ones, slots come from where `ragged.copy_out`
    put them.
    """
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    h = (row % kv_heads).to(tl.int64)
    count = tl.minimum(tl.load(moves + row * 2), tl.load(moves + row * 2 + 1))
    sources += row.to(tl.int64) * listed
    targets += row.to(tl.int64) * listed
    table += b * ta_b + h * ta_h
    next_table += b * nt_b + h * nt_h
    in_place = count * 0  # slots from here on are read from their pages
    if DEAL:
        in_place = tl.where(tl.load(spare + b * sp_b) >= 0, LARGEST, 0)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    d = tl.arange(0, D_PAD)[None, :]
    dv = tl.arange(0, DV_PAD)[None, :]
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        r = start + tl.arange(0, ROWS)
        there = r < count
        source = tl.load(sources + r, mask=there, other=0)
        target = tl.load(targets + r, mask=there, other=0)
        new = there & (source < 0)
        old = there & (source >= in_place)
        token = tl.where(new, -1 - source, 0).to(tl.int64)
        if DEAL:
            page = tl.load(next_table + (target // PAGE) * nt_p, mask=there, other=0).to(tl.int64)
        else:
            page = tl.load(table + (target // PAGE) * ta_p, mask=there, other=0).to(tl.int64)
        to = page * PAGE + target % PAGE
        page = tl.load(table + (source // PAGE) * ta_p, mask=old, other=0).to(tl.int64)
        came = page * PAGE + tl.where(old, source, 0) % PAGE

        x = tl.load(k + token[:, None] * k_t + d, mask=new[:, None] & (d < D)).to(k_pages.dtype.element_ty)
        y = tl.load(k_pages + came[:, None] * D + d, mask=old[:, None] & (d < D))
        xv = tl.load(v + token[:, None] * v_t + dv, mask=new[:, None] & (dv < DV)).to(v_pages.dtype.element_ty)
        yv = tl.load(v_pages + came[:, None] * DV + dv, mask=old[:, None] & (dv < DV))
        score = tl.load(new_scores + b * ns_b + h * ns_h + token * ns_t, mask=new).to(tl.float32)
        score = tl.where(new, score, tl.load(score_pages + came, mask=old))
        pos = tl.load(positions + b * po_b + token * po_t, mask=new, other=0).to(tl.int32)
        turn = tl.load(rotary + b * ro_b + token * ro_t, mask=new, other=0).to(tl.int32)
        pos = tl.where(new, pos, tl.load(pos_pages + came * 2, mask=old, other=0))
        turn = tl.where(new, turn, tl.load(pos_pages + came * 2 + 1, mask=old, other=0))
        if DEAL:
            out = there & (source >= 0) & (source < in_place)
            came = row.to(tl.int64) * capacity + r
            y = tl.where(out[:, None], tl.load(k_out + came[:, None] * D + d, mask=out[:, None] & (d < D)), y)
            yv = tl.where(out[:, None], tl.load(v_out + came[:, None] * DV + dv, mask=out[:, None] & (dv < DV)), yv)
            score = tl.where(out, tl.load(score_out + came, mask=out), score)
            pos = tl.where(out, tl.load(pos_out + came * 2, mask=out, other=0), pos)
            turn = tl.where(out, tl.load(pos_out + came * 2 + 1, mask=out, other=0), turn)

        tl.store(k_pages + to[:, None] * D + d, tl.where(new[:, None], x, y), mask=there[:, None] & (d < D))
        tl.store(v_pages + to[:, None] * DV + dv, tl.where(new[:, None], xv, yv), mask=there[:, None] & (dv < DV))
        tl.store(score_pages + to, score, mask=there)
        tl.store(pos_pages + to * 2, pos, mask=there)
        tl.store(pos_pages + to * 2 + 1, turn, mask=there)


def plan_config(entries: int) -> tuple[int, int, int]:
    """(BLOCK, TAIL, warps) of `_plan` for so many entries per head. Two counts share an int32, so there are fewer than
    32768 entries per block and blocks per head."""
    if entries <= 1024:
        return 256, 64, 4
    if entries <= 4096:
        return 1024, 128, 8
    return (2048, 256, 16) if entries <= 32768 else (4096, 256, 32)


def move_config(k_dim: int, itemsize: int) -> tuple[int, int]:
    """(ROWS, warps) of `_move`: about 8 KiB of keys per iteration, four 16-byte accesses per thread."""
    rows = max(8, 8192 // (triton.next_power_of_2(k_dim) * itemsize))
    return min(rows, 64), 4


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()


def cache_update(
    new: NewTokens,
    rows: Rows,
    cache: Cache,
    eviction: Eviction,
    ragged: Ragged = EQUAL,
    plan: tuple[int, int, int] | None = None,
    move: tuple[int, int] | None = None,
) -> None:
    """`kvrewrite::cache_update` for T >= 1 new tokens, without threshold; in place.

    k, v: last dim contiguous; valid, recent and the pools contiguous; the others strided as they like. The kept slots
    of a head are the reference's; their order is not. Positions are unique within a head and not negative. Where more
    is kept than the table has room for (the caller leases pages first), what does not fit is lost. floor: contiguous;
    spare (B, W), last dim contiguous, and next_table (B, Hkv, W'), W' >= P: both or none of the two. Pages that are
    dealt may be a row's own, but nobody else's. plan, move: other configurations than `plan_config` and `move_config`
    give, for measurements.
    """
    k, v, new_scores, slot_scores = new
    positions, rotary, valid, keep, recent = rows
    k_pages, v_pages, score_pages, pos_pages, table, lens = cache
    first, window, chunk, select, drop = eviction
    floor, spare, next_table, _ = ragged
    b, hkv, tokens, k_dim = k.shape
    page, v_dim = k_pages.shape[1], v.shape[3]
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"the last dim of k and v must be contiguous, got strides {k.stride()} and {v.stride()}")
    for name, pool in (("k", k_pages), ("v", v_pages), ("score", score_pages), ("pos", pos_pages)):
        if not pool.is_contiguous():
            raise ValueError(f"{name}_pages must be contiguous, got shape {tuple(pool.shape)}, strides {pool.stride()}")
    if (spare is None) != (next_table is None):
        raise ValueError("got one of spare and next_table, expected both or none")
    if spare is not None and spare.stride(1) != 1:
        raise ValueError(f"the last dim of spare must be contiguous, got strides {spare.stride()}")
    heads, capacity, device = b * hkv, table.shape[2] * page, table.device
    block, tail, warps = plan_config(capacity + tokens) if plan is None else plan
    if capacity + tokens + 2 * block >= 2**21:
        raise ValueError(f"at most 2**21 entries per head can be counted, got {capacity} slots and {tokens} new tokens")
    room = capacity if next_table is None else next_table.shape[2] * page
    listed = max(capacity, min(room, capacity + tokens))
    stride = triton.cdiv(capacity, block) * block + triton.cdiv(tokens, block) * block
    keys, places = torch.empty(2, heads, stride, dtype=torch.int32, device=device)
    indices = torch.empty(heads, tail, dtype=torch.int32, device=device)
    orders = torch.empty(heads, tail, dtype=torch.int64, device=device)
    facts = torch.empty(heads, 8, dtype=torch.int32, device=device)
    moves = torch.empty(heads, 2, dtype=torch.int32, device=device)  # slots to fill, entries to fill them with
    filled = torch.empty(heads, dtype=torch.int32, device=device)
    sources, targets = torch.empty(2, heads, listed, dtype=torch.int32, device=device)
    unused = moves
    slots = unused if slot_scores is None else slot_scores
    by = unused if select is None else select
    dropped = unused if drop is None else drop.view(torch.uint8)
    budgets = unused if floor is None else torch.empty(heads, dtype=torch.int32, device=device)
    dealt = (unused, 0) if spare is None else (spare, spare.stride(0))

    def planned(stage: int) -> None:
        _plan[(heads,)](
            new_scores, *new_scores.stride(), slots, *_strides(slot_scores, 3), by, *_strides(select, 3),
            dropped, *_strides(drop, 3), positions, *positions.stride(), valid, keep, *keep.stride(), recent, score_pages,
            pos_pages.view(torch.int64), table, *table.stride(), lens, *lens.stride(), keys, places, indices, orders,
            filled, facts, sources, targets, moves, unused if floor is None else floor, budgets, *dealt, stride, capacity, room,
            listed, tokens, hkv, window, chunk,
            SINKS=first, MASKED=bool(window or chunk), RESCORE=slot_scores is not None, SELECT=select is not None,
            DROP=drop is not None, PAGE=page, BLOCK=block, TAIL=tail, DEAL=spare is not None, STAGE=stage, num_warps=warps,
        )  # fmt: skip

    if floor is None:
        planned(0)
    else:
        planned(1)
        share_budgets(keys, facts, floor, valid, keep, budgets, block)
        planned(2)
    span = block if stride > 32768 else min(block, 1024)
    _lists[(triton.cdiv(stride, span), heads, 2)](
        keys, facts, sources, targets, moves, stride, listed, SPAN=span, BLOCK=block, num_warps=4 if block < 4096 else 8,
    )  # fmt: skip
    per_turn, warps = move_config(k_dim, k_pages.element_size()) if move is None else move
    # Once the cache is full no more than T slots of a head move; only after budgets shrink does a program take several
    # turns.
    programs = min(triton.cdiv(listed, per_turn), max(triton.cdiv(tokens, per_turn), 8))
    copied: tuple[Tensor, Tensor, Tensor, Tensor] = (k_pages, v_pages, score_pages, pos_pages)
    if spare is not None and next_table is not None:
        deal(spare, table, next_table, lens, page)
        copied = copy_out(cache, slot_scores, spare, sources, moves, per_turn)
    following = table if next_table is None else next_table
    _move[(programs, heads)](
        k, *k.stride()[:3], v, *v.stride()[:3], new_scores, *new_scores.stride(), positions, *positions.stride(), rotary,
        *rotary.stride(), k_pages, v_pages, score_pages, pos_pages, table, *table.stride(), sources, targets, moves,
        listed, hkv, *dealt, following, *following.stride(), *copied, capacity,
        D=k_dim, D_PAD=triton.next_power_of_2(k_dim), DV=v_dim, DV_PAD=triton.next_power_of_2(v_dim),
        PAGE=page, ROWS=per_turn, DEAL=spare is not None, num_warps=warps,
    )  # fmt: skip
