"""What decoding does to a quantized cache after attention: one new token per row comes in, and what has no room goes.

Everything happens in place and in one launch, a program for each (row, kv head). What goes is found as in
`decode_update.py`. Where the rest lies then is the rule of `kernels/quantized/reference.py` (`place`), to the slot, and
codes have the reference's bits: a group of keys that somebody joins is read, its ends are widened, and it is coded
again.

As a rule a new token only goes after the last one in the tail, or one slot is evicted and the oldest of the tail takes
its place, for which one group of keys is coded and the tail moves up. Loops serve what is rarer: more than one slot
goes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvrewrite.kernels.attention.decode import PAGE
from kvrewrite.kernels.groups import Codes, Eviction, NewTokens, QuantizedCache, Rows
from kvrewrite.kernels.launch import begin, options
from kvrewrite.kernels.quantized.decode import check_pools
from kvrewrite.kernels.quantized.scheme import FP8_MAX, Scheme
from kvrewrite.kernels.quantized.tiles import why_not
from kvrewrite.kernels.update.decode import MOST_SLOTS, eviction_cut, least_slot, sort_key, visible_slots

_PAGE = tl.constexpr(PAGE)
_FP8_MAX = tl.constexpr(FP8_MAX)
_FP8_UNIT = tl.constexpr(1.0 / FP8_MAX)
_ROUND = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: added to a small fp32 number and taken off, it rounds it, halves to even
MOVED_BYTES = 8192  # of the tail, keys and values, that a warp moves at a time


@triton.jit
def _pool_rows(slot, mask, pages, table_p):
    """Where slots lie in a pool."""
    page = tl.load(pages + (slot // _PAGE) * table_p, mask=mask, other=0).to(tl.int64)
    return page * _PAGE + slot % _PAGE


@triton.jit
def _stay(
    slot, n, gone, many, cut, pages, places, score_pages, select, table_p, sinks, newest_from, following, window, chunk,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Which cached slots stay: all but `gone`, or if many go those with keys of at least `cut`."""
    stays = (slot >= 0) & (slot < n) & (slot != gone)
    if many:
        at = _pool_rows(slot, stays, pages, table_p)
        pos = tl.load(places + at, mask=stays, other=0).to(tl.int32)
        if SELECT:
            by = tl.load(select + slot, mask=stays, other=0.0).to(tl.float32)
        else:
            by = tl.load(score_pages + at, mask=stays, other=0.0)
        seen = visible_slots(pos, following, window, chunk, WINDOW, CHUNK)
        stays = stays & (sort_key(by, pos, seen, (pos < sinks) | (pos >= newest_from)) >= cut)
    return stays


@triton.jit
def _worth(slot, mask, n, new_score, new_place, score_pages, places, pages, table_p):
    """Scores and positions of slots, of which slot n is the new token."""
    cached = mask & (slot < n)
    row = _pool_rows(slot, cached, pages, table_p)
    score = tl.where(slot == n, new_score, tl.load(score_pages + row, mask=cached, other=0.0))
    place = tl.where(slot == n, new_place, tl.load(places + row, mask=cached, other=0))
    return score, place


@triton.jit
def _pick(values, at, index):
    """values whose place in `at` is `index`."""
    return tl.sum(tl.where(at[None, :] == index[:, None], values[None, :], 0), 1)


@triton.jit
def _decoded(codes, low, high, KIND: tl.constexpr):
    """What codes stand for, in the dtype of low and high, the ends of their group (fp8: its largest magnitude is
    `high`)."""
    if KIND == "fp8":
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32) * _FP8_UNIT * high.to(tl.float32)
    else:
        unit: tl.constexpr = 1.0 / 15 if KIND == "int4" else 1.0 / 255
        share = codes.to(tl.float32) * unit
        x = high.to(tl.float32) * share + low.to(tl.float32) * (1.0 - share)
    return x.to(high.dtype)


@triton.jit
def _encoded(x, low, high, live, KIND: tl.constexpr):
    """Codes of fp32 numbers x in a group with these ends, fp32; 0 where not live."""
    if KIND == "fp8":
        there = live & (high > 0)
        unit = tl.where(there, tl.div_rn(tl.where(there, x, 0.0), tl.where(there, high, 1.0)), 0.0) * _FP8_MAX
        size = tl.minimum(tl.abs(unit), _FP8_MAX)
        bits = size.to(tl.int32, bitcast=True)
        # To three bits after the leading one, halves to even; below 2**-6 to multiples of 2**-9.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (size * 512.0 + _ROUND - _ROUND).to(tl.int32)
        code = tl.where(size < 0.015625, small, normal) | tl.where(unit.to(tl.int32, bitcast=True) < 0, 128, 0)
    else:
        levels: tl.constexpr = 15.0 if KIND == "int4" else 255.0
        span = high - low
        there = live & (span > 0)
        unit = tl.where(there, tl.div_rn(tl.where(there, x - low, 0.0), tl.where(there, span, 1.0)), 0.0)
        code = tl.minimum(tl.maximum(unit * levels + _ROUND - _ROUND, 0.0), levels).to(tl.int32)
    return code.to(tl.uint8)


@triton.jit
def _nibble(codes, HALF: tl.constexpr, KIND: tl.constexpr):
    """Codes of one half of the channels."""
    if KIND == "int4":
        if HALF == 1:
            codes = codes >> 4
        codes = codes & 15
    return codes


@triton.jit
def _recoded_keys(
    row, anchored, live, from_tail, entry, from_pool, source, k_pages, k_params, tail_k,
    D: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Codes of half of the channels of a group of keys at pool rows `row`, whose ends are stored.

    Slots that are anchored keep their keys; from_tail: the key is that of an entry of the tail, from_pool: that at pool
    row `source`. live: which slots there are.
    """
    d = tl.arange(0, KWP)
    inside = (d < KW)[None, :]
    channel = HALF * KW + d
    dtype: tl.constexpr = tail_k.dtype.element_ty
    group = tl.max(row // STEP, 0)
    ends_at = k_params + (group * D + channel) * P
    old_high = tl.load(ends_at + (P - 1), mask=d < KW, other=0.0)
    old_low = old_high
    if P == 2:
        old_low = tl.load(ends_at, mask=d < KW, other=0.0)
    has_old = tl.max(anchored.to(tl.int32), 0) > 0
    held = tl.where(anchored, row, source)
    of_pool = (anchored | from_pool)[:, None] & inside
    codes = _nibble(tl.load(k_pages + held[:, None] * KW + d[None, :], mask=of_pool, other=0), HALF, KIND)
    held_at = k_params + ((held // STEP)[:, None] * D + channel[None, :]) * P
    held_high = tl.load(held_at + (P - 1), mask=of_pool, other=0.0)
    held_low = held_high
    if P == 2:
        held_low = tl.load(held_at, mask=of_pool, other=0.0)
    keys = _decoded(codes, held_low, held_high, KIND)
    of_tail = from_tail[:, None] & inside
    fresh = tl.load(tail_k + entry[:, None] * D + channel[None, :], mask=of_tail, other=0.0)
    x = tl.where(of_tail, fresh, keys).to(tl.float32)
    there = live[:, None] & inside
    low = tl.min(tl.where(there, x, float("inf")), 0)
    high = tl.max(tl.where(there, x, float("-inf")), 0)
    if KIND == "fp8":
        high = tl.max(tl.where(there, tl.abs(x), 0.0), 0)
        high = tl.where(has_old, tl.maximum(high, old_high.to(tl.float32)), high)
        low = high
    else:
        low = tl.where(has_old, tl.minimum(low, old_low.to(tl.float32)), low) + 0.0  # no -0, as in the reference
        high = tl.where(has_old, tl.maximum(high, old_high.to(tl.float32)), high) + 0.0
    tl.debug_barrier()  # all has been read
    tl.store(ends_at + (P - 1), high.to(dtype), mask=d < KW)
    if P == 2:
        tl.store(ends_at, low.to(dtype), mask=d < KW)
    return _encoded(x, low[None, :], high[None, :], there, KIND)


@triton.jit
def _coded_values(
    row, from_tail, entry, tail_v, v_params, DV: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, VG: tl.constexpr,
    P: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Codes of half of the channels of values of the tail, whose ends are stored already."""
    e = tl.arange(0, VWP)
    channel = HALF * VW + e
    of_tail = from_tail[:, None] & (e < VW)[None, :]
    x = tl.load(tail_v + entry[:, None] * DV + channel[None, :], mask=of_tail, other=0.0).to(tl.float32)
    at = v_params + (row[:, None] * (DV // VG) + (channel // VG)[None, :]) * P
    high = tl.load(at + (P - 1), mask=of_tail, other=0.0).to(tl.float32)
    low = high
    if P == 2:
        low = tl.load(at, mask=of_tail, other=0.0).to(tl.float32)
    return _encoded(x, low, high, of_tail, KIND)


@triton.jit(
    do_not_specialize=[
        "sinks", "window", "chunk", "k_b", "k_h", "v_b", "v_h", "new_b", "new_h", "slots_b", "slots_h", "pos_b", "rot_b",
        "keep_b", "keep_h", "table_b", "table_h", "lens_b", "lens_h", "qlens_b", "select_b", "select_h", "drop_b", "drop_h",
    ]
)  # fmt: skip
def _update_kernel(
    k, v, new_scores, slot_scores, positions, rotary, valid, keep, recent, k_pages, v_pages, k_params, v_params, score_pages,
    places, k_tail, v_tail, table, lens, qlens, select, drop, sinks, window, chunk, capacity,
    k_b, k_h, v_b, v_h, new_b, new_h, slots_b, slots_h, pos_b, rot_b, keep_b, keep_h, table_b, table_h, table_p, lens_b,
    lens_h, qlens_b, qlens_h, select_b, select_h, drop_b, drop_h,
    HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, VG: tl.constexpr, VGP: tl.constexpr, NG: tl.constexpr,
    NGP: tl.constexpr, TAIL: tl.constexpr, TAILP: tl.constexpr, MOVES: tl.constexpr, STEP: tl.constexpr,
    P: tl.constexpr, KIND: tl.constexpr, PAGES: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SLOT_SCORES: tl.constexpr, SELECT: tl.constexpr, DROP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """P: parameters of a group; STEP: slots of a group of keys; TAIL: entries of the tail, MOVES: how many of them move
    at a time; KW, VW: bytes of a slot's codes; NG groups of VG channels make a value."""
    head = tl.program_id(0)
    b = (head // HKV).to(tl.int64)
    h = head % HKV
    begin(PDL)
    pages = table + b * table_b + h * table_h
    slot_scores += b * slots_b + h * slots_h
    select += b * select_b + h * select_h
    n = tl.load(lens + b * lens_b + h * lens_h)
    nq = tl.load(qlens + b * qlens_b + h * qlens_h)
    real = tl.load(valid + b) > 0
    budget = tl.load(keep + b * keep_b + h * keep_h).to(tl.int64)
    protect = tl.load(recent + b).to(tl.int64)
    new_pos = tl.load(positions + b * pos_b).to(tl.int32)
    new_score = tl.load(new_scores + b * new_b + h * new_h).to(tl.float32)
    turned = tl.load(rotary + b * rot_b).to(tl.int32)
    new_place = (turned.to(tl.int64) << 32) | new_pos.to(tl.int64)
    arrives = real
    if DROP:
        arrives = real & (tl.load(drop + b * drop_b + h * drop_h) == 0)
    following = new_pos + 1
    new_seen = arrives & visible_slots(new_pos, following, window, chunk, WINDOW, CHUNK)
    least, victim, lost, _, over, newest_from = least_slot(
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
        many = going > 1
        comes = new_seen
        gone = n - n - 1
        cut = tl.full((), 0, tl.int64)
        if going == 1:
            if (lost == 0) & new_seen & (new_key <= least):
                comes = n < 0
            else:
                gone = victim
        if many:
            cut = eviction_cut(
                n, new_seen, new_key, budget, over, newest_from, new_pos, pages, places, score_pages, slot_scores, select,
                table_p, sinks, window, chunk, PAGES, WINDOW, CHUNK, SLOT_SCORES, SELECT,
            )  # fmt: skip
            comes = new_seen & (new_key >= cut)

        # The new token is the tail's last entry from here on.
        tail_k = k_tail + head.to(tl.int64) * (TAIL * D)
        tail_v = v_tail + head.to(tl.int64) * (TAIL * DV)
        if comes:
            d, e = tl.arange(0, DP), tl.arange(0, DVP)
            new_k = tl.load(k + b * k_b + h * k_h + d, mask=d < D, other=0.0)
            new_v = tl.load(v + b * v_b + h * v_h + e, mask=e < DV, other=0.0)
            tl.store(tail_k + (n - nq) * D + d, new_k.to(k_tail.dtype.element_ty), mask=d < D)
            tl.store(tail_v + (n - nq) * DV + e, new_v.to(v_tail.dtype.element_ty), mask=e < DV)

        # How many stay where; see `place` in the reference.
        t = tl.arange(0, TAILP)
        stays = _stay(
            nq + t, n, gone, many, cut, pages, places, score_pages, select, table_p, sinks, newest_from, following, window, chunk,
            WINDOW, CHUNK, SELECT,
        )  # fmt: skip
        is_new = t == tl.where(comes, n - nq, -1)
        fresh = stays | is_new
        rank = tl.cumsum(fresh.to(tl.int32), 0) - 1
        n_fresh = tl.sum(fresh.to(tl.int32), 0)
        n_stays = nq - ((gone >= 0) & (gone < nq)).to(tl.int32)
        first_free = tl.where((gone >= 0) & (gone < nq), gone, nq)
        if many:
            n_stays = n - n
            first_free = nq
            for i in range(tl.cdiv(nq, _PAGE)):
                slot = i * _PAGE + tl.arange(0, _PAGE)
                kept = _stay(
                    slot, nq, gone, many, cut, pages, places, score_pages, select, table_p, sinks, newest_from, following,
                    window, chunk, WINDOW, CHUNK, SELECT,
                )  # fmt: skip
                n_stays += tl.sum(kept.to(tl.int32), 0)
                first_free = tl.minimum(first_free, tl.min(tl.where((slot < nq) & (kept == 0), slot, nq), 0))
        holes = tl.cdiv(nq, STEP) * STEP - n_stays
        excess = tl.maximum(n_fresh - (TAIL - STEP), 0)
        filled = tl.minimum(excess, holes)
        flushed = filled + (excess - filled) // STEP * STEP
        q = n_stays + flushed
        tl.debug_barrier()  # the new token is in the tail

        # Groups in which somebody takes a free place: first the oldest of the tail, then slots after q.
        given = n - n  # places that have been taken
        behind = q
        g = first_free // STEP
        while g * STEP < q:
            slot = g * STEP + tl.arange(0, STEP)
            anchored = (slot < nq) & _stay(
                slot, n, gone, many, cut, pages, places, score_pages, select, table_p, sinks, newest_from, following, window,
                chunk, WINDOW, CHUNK, SELECT,
            )  # fmt: skip
            live = slot < q
            anchored = anchored & live
            free = live & (anchored == 0)
            taken = tl.sum(free.to(tl.int32), 0)
            if taken > 0:
                number = given + tl.cumsum(free.to(tl.int32), 0) - 1
                from_tail = free & (number < flushed)
                match = (rank[None, :] == number[:, None]) & fresh[None, :] & from_tail[:, None]
                entry = tl.sum(tl.where(match, t[None, :], 0), 1)
                # Nothing that has been written so far was where these are read.
                score, place = _worth(
                    nq + entry, from_tail, n, new_score, new_place, score_pages, places, pages, table_p
                )
                from_pool = free & (number >= flushed)
                source = slot.to(tl.int64) * 0
                wanted = tl.sum(from_pool.to(tl.int32), 0)
                if wanted > 0:
                    moving = slot * 0
                    got = n - n
                    while (got < wanted) & (behind < nq):
                        other = behind + tl.arange(0, STEP)
                        kept = (other < nq) & _stay(
                            other, n, gone, many, cut, pages, places, score_pages, select, table_p, sinks, newest_from,
                            following, window, chunk, WINDOW, CHUNK, SELECT,
                        )  # fmt: skip
                        order = got + tl.cumsum(kept.to(tl.int32), 0) - 1
                        # Which of the group's free places that are left each of them takes.
                        turn = number - tl.maximum(flushed, given)
                        pair = (order[None, :] == turn[:, None]) & kept[None, :] & from_pool[:, None]
                        moving += tl.sum(tl.where(pair, other[None, :], 0), 1)
                        taking = kept & (order < wanted)
                        got += tl.sum(taking.to(tl.int32), 0)
                        last = tl.max(tl.where(taking, other, -1), 0)
                        behind = tl.where(got < wanted, behind + STEP, last + 1)
                    source = _pool_rows(moving, from_pool, pages, table_p)
                    score = tl.where(from_pool, tl.load(score_pages + source, mask=from_pool, other=0.0), score)
                    place = tl.where(from_pool, tl.load(places + source, mask=from_pool, other=0), place)
                row = _pool_rows(slot, slot >= 0, pages, table_p)

                j, i = tl.arange(0, NGP), tl.arange(0, VGP)
                of_group = from_tail[:, None, None] & (j < NG)[None, :, None] & (i < VG)[None, None, :]
                at = tail_v + entry[:, None, None] * DV + (j * VG)[None, :, None] + i[None, None, :]
                x = tl.load(at, mask=of_group, other=0.0).to(tl.float32)
                if KIND == "fp8":
                    v_high = tl.max(tl.abs(x), 2)
                    v_low = v_high
                else:
                    v_high = tl.max(tl.where(of_group, x, float("-inf")), 2) + 0.0
                    v_low = tl.min(tl.where(of_group, x, float("inf")), 2) + 0.0
                w = tl.arange(0, VWP)
                # Rows that none moves from are read, too, and `from_pool` is not used as a column again: in fp8 Triton
                # 3.6 takes that from the loop above, where it is not always computed, and ends with an error.
                moved_codes = (slot >= 0)[:, None] & (w < VW)[None, :]
                old_codes = tl.load(v_pages + source[:, None] * VW + w[None, :], mask=moved_codes, other=0)
                in_ends = (slot >= 0)[:, None] & (j < NG)[None, :]
                from_ends = v_params + (source[:, None] * NG + j[None, :]) * P
                old_high = tl.load(from_ends + (P - 1), mask=in_ends, other=0.0)
                old_low = old_high
                if P == 2:
                    old_low = tl.load(from_ends, mask=in_ends, other=0.0)
                moves = (number >= flushed)[:, None]  # `from_pool` of those that are free, which are all that is stored
                dtype: tl.constexpr = v_params.dtype.element_ty
                to_ends = v_params + (row[:, None] * NG + j[None, :]) * P
                any_ends = free[:, None] & (j < NG)[None, :]
                tl.store(to_ends + (P - 1), tl.where(moves, old_high, v_high.to(dtype)), mask=any_ends)
                if P == 2:
                    tl.store(to_ends, tl.where(moves, old_low, v_low.to(dtype)), mask=any_ends)

                k_codes = _recoded_keys(
                    row, anchored, live, from_tail, entry, from_pool, source, k_pages, k_params, tail_k, D, KW, KWP, STEP, P, 0,
                    KIND,
                )  # fmt: skip
                if KIND == "int4":
                    upper = _recoded_keys(
                        row, anchored, live, from_tail, entry, from_pool, source, k_pages, k_params, tail_k, D, KW, KWP, STEP,
                        P, 1, KIND,
                    )  # fmt: skip
                    k_codes = k_codes | (upper << 4)
                tl.debug_barrier()
                v_codes = _coded_values(row, from_tail, entry, tail_v, v_params, DV, VW, VWP, VG, P, 0, KIND)
                if KIND == "int4":
                    upper = _coded_values(row, from_tail, entry, tail_v, v_params, DV, VW, VWP, VG, P, 1, KIND)
                    v_codes = v_codes | (upper << 4)
                v_codes = tl.where(moves, old_codes, v_codes)
                c = tl.arange(0, KWP)
                tl.store(
                    k_pages + row[:, None] * KW + c[None, :], k_codes, mask=(c < KW)[None, :] & (slot >= 0)[:, None]
                )
                tl.store(v_pages + row[:, None] * VW + w[None, :], v_codes, mask=(w < VW)[None, :] & free[:, None])
                tl.store(score_pages + row, score, mask=free)
                tl.store(places + row, place, mask=free)
                tl.debug_barrier()
            given += taken
            g += 1
            if (many == 0) & (g * STEP < nq):
                g = nq // STEP  # one place is free below, and the others are after it

        # What is left of the tail moves up.
        if (flushed > 0) | (gone >= nq) | many:
            for at in range(0, TAIL, MOVES):
                old = at + tl.arange(0, MOVES)
                # As found before: places below have been filled, some of which were the tail's own.
                new = tl.where(fresh, rank - flushed, -1)
                if MOVES < TAILP:
                    new = _pick(new + 1, t, old) - 1
                goes = new >= 0
                score, place = _worth(nq + old, goes, n, new_score, new_place, score_pages, places, pages, table_p)
                d, e = tl.arange(0, DP), tl.arange(0, DVP)
                of_k, of_v = goes[:, None] & (d < D)[None, :], goes[:, None] & (e < DV)[None, :]
                keys = tl.load(tail_k + old[:, None] * D + d[None, :], mask=of_k, other=0.0)
                values = tl.load(tail_v + old[:, None] * DV + e[None, :], mask=of_v, other=0.0)
                tl.debug_barrier()
                tl.store(tail_k + new[:, None] * D + d[None, :], keys, mask=of_k)
                tl.store(tail_v + new[:, None] * DV + e[None, :], values, mask=of_v)
                to_row = _pool_rows(q + new, goes, pages, table_p)
                tl.store(score_pages + to_row, score, mask=goes)
                tl.store(places + to_row, place, mask=goes)
                tl.debug_barrier()
        else:
            # The tail stays where it is, though it may count from another slot.
            moved = is_new | (stays & (q + rank != nq + t))
            to_row = _pool_rows(q + rank, moved, pages, table_p)
            score, place = _worth(nq + t, moved, n, new_score, new_place, score_pages, places, pages, table_p)
            tl.debug_barrier()
            tl.store(score_pages + to_row, score, mask=moved)
            tl.store(places + to_row, place, mask=moved)
        tl.store(lens + b * lens_b + h * lens_h, n_stays + n_fresh)
        tl.store(qlens + b * qlens_b + h * qlens_h, q)


def decode_update_quantized(
    new: NewTokens, rows: Rows, cache: QuantizedCache, codes: Codes, scheme: Scheme, eviction: Eviction
) -> None:
    """`kvrewrite::cache_update_quantized` for one new token per row, in heads that neither share budgets nor merge
    slots.

    Arguments as `decode_update` and `decode_attention_quantized` have them; k, v, parameters and tails in one dtype
    (bf16, fp16, fp32). What stays, the order of slots, codes, parameters and tails are exactly the reference's where
    slots are live; the rest may be anything. Positions of a head's slots are different from one another, not negative,
    and earlier than the newcomer's.
    """
    k, v, new_scores, slot_scores = new
    positions, rotary, valid, keep, recent = rows
    score_pages, pos_pages, table, lens, qlens, _, _ = cache
    k_pages, v_pages, k_params, v_params, k_tail, v_tail = codes
    first, window, chunk, select, drop = eviction
    b, hkv, t, d = k.shape
    dv, capacity = v.shape[3], table.shape[2] * PAGE
    if t != 1:
        raise ValueError(f"decode_update_quantized takes one token per row, got {t}")
    if capacity >= MOST_SLOTS:
        raise ValueError(
            f"decode_update_quantized takes fewer than {MOST_SLOTS} slots per head, got room for {capacity}"
        )
    if k.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"decode_update_quantized takes bf16, fp16 or fp32, got {k.dtype}")
    if why := why_not(scheme, d, dv):
        raise ValueError(f"decode_update_quantized: {why}")
    check_pools(scheme, k.dtype, d, dv, codes)
    if not b * hkv:
        return
    by_slot, chosen = score_pages if slot_scores is None else slot_scores, score_pages if select is None else select
    dropped = valid if drop is None else drop.view(torch.uint8)
    block = max(256, min(4096, triton.next_power_of_2(capacity)))
    group, tail = scheme.value_group(dv), k_tail.shape[2]
    code, code_v = scheme.code_width(d), scheme.code_width(dv)
    warps = max(8, block // 256)
    entry = (_padded(d) + _padded(dv)) * k.element_size()
    moves = max(16, min(_padded(tail), 1 << (MOVED_BYTES * warps // entry).bit_length() - 1))
    _update_kernel[(b * hkv,)](
        k, v, new_scores, by_slot, positions, rotary, valid.contiguous(), keep, recent.contiguous(), k_pages, v_pages,
        k_params, v_params, score_pages, pos_pages.view(torch.int64), k_tail, v_tail, table, lens, qlens, chosen, dropped,
        first, window, chunk, capacity,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), new_scores.stride(0), new_scores.stride(1),
        by_slot.stride(0), by_slot.stride(1), positions.stride(0), rotary.stride(0), keep.stride(0), keep.stride(1),
        table.stride(0), table.stride(1), table.stride(2), lens.stride(0), lens.stride(1), qlens.stride(0), qlens.stride(1),
        chosen.stride(0), chosen.stride(1), dropped.stride(0), 0 if drop is None else dropped.stride(1),
        HKV=hkv, D=d, DP=_padded(d), KW=code, KWP=_padded(code), DV=dv, DVP=_padded(dv), VW=code_v, VWP=_padded(code_v),
        VG=group, VGP=triton.next_power_of_2(group), NG=dv // group, NGP=triton.next_power_of_2(dv // group), TAIL=tail,
        TAILP=_padded(tail), MOVES=moves, STEP=scheme.group, P=scheme.parameters, KIND=scheme.kind, PAGES=block // PAGE,
        WINDOW=window > 0, CHUNK=chunk > 0, SLOT_SCORES=slot_scores is not None, SELECT=select is not None,
        DROP=drop is not None, num_warps=warps, enable_fp_fusion=False, **options(k.device),
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
