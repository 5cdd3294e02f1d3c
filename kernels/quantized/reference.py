"""Caches whose older slots are quantized: where tokens lie, and how they are read and written.

A head has `lens` live slots. Slots [0, qlens) hold codes and parameters in pages (`quantize.py`); slots [qlens, lens)
are the tail, the newest ones in order of position and in full precision, in a buffer of their own: slot s is tail entry
s - qlens. The buffer has `residual` + `group` entries.

Which slots share a group of keys changes what they are worth, so where a token goes is one rule for all devices
(`place`): what is quantized stays where it is as long as it lives; new tokens and the tail are in full precision until
there are more than `residual` of them; then the oldest take the places of what was evicted, and whole new groups after
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import EQUAL, Codes, Eviction, NewTokens, QuantizedCache, Ragged, Rows
from kvrewrite.kernels.quantized.scheme import (
    Scheme,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from kvrewrite.kernels.update.reference import Choice, choose, merge_victims


@dataclass
class Pools:
    """Keys or values of a layer's heads. codes: (pages, PAGE, width) uint8; params: as `quantize.py` has them, by page;
    tail: (B, Hkv, residual + group, D)."""

    codes: Tensor
    params: Tensor
    tail: Tensor

    def read(self, table: Tensor, qlens: Tensor, scheme: Scheme, values: bool) -> Tensor:
        """All slots in full precision: (B, Hkv, C, D); those that are not live hold anything."""
        decode = dequantize_values if values else dequantize_keys
        quantized = decode(pages.read(self.codes, table), pages.read(self.params, table), scheme)
        slot = torch.arange(quantized.shape[2], device=table.device)
        entry = (slot - qlens[..., None]).clamp(0, self.tail.shape[2] - 1).long()
        newest = torch.gather(self.tail, 2, entry[..., None].expand(*entry.shape, self.tail.shape[3]))
        return torch.where((slot < qlens[..., None])[..., None], quantized, newest)


def place(kept: Tensor, pos: Tensor, qlens: Tensor, residual: int, group: int, width: int) -> tuple[Tensor, Tensor]:
    """Where everything lies from now on: kept, pos (B, Hkv, C + T) of [cached slots, new tokens], qlens (B, Hkv).

    Returns source (B, Hkv, width), for each slot the index in [C + T] of what lies there (-1: nothing), and the new
    qlens. The rule, for a head with S = kept slots that are quantized and F = what else is kept, in order of position:

        holes = slots that S leaves, up to the end of its last group; e = max(0, |F| - residual)
        the f oldest of F are quantized: e of them if there are e holes, else one a hole and then whole groups
        q = |S| + f slots are quantized; S stays where it is below q
        free slots below q are filled from the front: with the f in order of position, then with what S has after q
        the rest of F lies at q, q + 1, ... in order of position
    """
    b, hkv, n = kept.shape
    index = torch.arange(n, device=kept.device)
    stays = kept & (index < qlens[..., None])
    fresh = kept & ~stays
    n_stays, n_fresh = stays.sum(-1), fresh.sum(-1)
    ends = (qlens.long() + group - 1) // group * group
    holes = ends - n_stays
    excess = (n_fresh - residual).clamp(min=0)
    filled = torch.minimum(excess, holes)
    flushed = filled + (excess - filled) // group * group
    q = n_stays + flushed
    # Of the fresh ones in order of position, number i goes to the i-th free slot below q, or after q.
    by_position = torch.argsort(torch.where(fresh, pos.long(), torch.iinfo(torch.int64).max), dim=-1, stable=True)
    number = torch.empty_like(by_position).scatter_(-1, by_position, index.expand_as(by_position))
    moves = stays & (index >= q[..., None])
    number = torch.where(moves, flushed[..., None] + moves.long().cumsum(-1) - 1, number)
    slot = torch.arange(width, device=kept.device)
    anchored = torch.nn.functional.pad(stays, (0, max(0, width - n)))[..., :width]
    free = (slot < q[..., None]) & ~anchored
    order = torch.argsort((~free).to(torch.int8), dim=-1, stable=True)  # free slots first, ascending
    into_free = torch.gather(order, -1, number.clamp(max=width - 1))
    behind = n_stays[..., None] + number
    target = torch.where(moves | (number < flushed[..., None]), into_free, behind)
    target = torch.where(stays & ~moves, index, target)
    target = torch.where(kept, target, width).clamp(max=width)
    source = torch.full((b, hkv, width + 1), -1, dtype=torch.int64, device=kept.device)
    source.scatter_(-1, target, index.expand(b, hkv, n))
    return source[..., :width], q


class Moves(NamedTuple):
    """What `place` says of a layer: source (B, Hkv, width); qlens before, q after; n_kept (B, Hkv) live slots after;
    table before, next_table after, with new pages in `dealt` (B, 1, 1) rows."""

    source: Tensor
    qlens: Tensor
    q: Tensor
    n_kept: Tensor
    table: Tensor
    next_table: Tensor
    dealt: Tensor | None


class _Groups(NamedTuple):
    """What becomes of keys: groups that are coded again; slots that stay in place, and that are quantized; slots, and
    groups' parameters, that go to a new page as they are."""

    touched: Tensor
    stays: Tensor
    quantized: Tensor
    moved: Tensor
    moved_groups: Tensor


def write(pools: Pools, dense: Tensor, changed: Tensor | None, moves: Moves, scheme: Scheme, values: bool) -> None:
    """Stores what `place` says.

    dense: (B, Hkv, C + T, D) in full precision; changed (B, Hkv, C + T): what no longer is what its codes say.
    What stays where it is keeps its codes.
    Where keys join a group its ends only widen, as long as one of it stays, and all of it is coded again.
    """
    source, qlens, q, n_kept, table, _, dealt = moves
    group, width = scheme.group, source.shape[2]
    slot = torch.arange(width, device=table.device)
    quantized = slot < q[..., None]
    # Codes that still hold, be it at another slot.
    coded = quantized & (source < qlens[..., None])
    if changed is not None:
        coded = coded & ~torch.gather(changed, -1, source.clamp(min=0))
    stays = coded & (source == slot)
    renewed = torch.zeros_like(stays) if dealt is None else dealt.expand_as(stays)
    if values:
        _recode_values(pools, dense, moves, quantized & ~coded, coded & (~stays | renewed), scheme)
    else:
        by_group = (*source.shape[:2], width // group, group)
        touched = (quantized & ~stays).reshape(by_group).any(-1)
        kept_codes = stays & renewed & ~touched.repeat_interleave(group, dim=-1)
        old_params = renewed.reshape(by_group)[..., 0] & quantized.reshape(by_group).any(-1) & ~touched
        recoded = _Groups(touched, stays, quantized, kept_codes, old_params)
        _recode_keys(pools, dense, moves, recoded, scheme)
    entry = torch.arange(pools.tail.shape[2], device=table.device)
    at = (q[..., None] + entry).clamp(max=width - 1)
    newest = torch.gather(source, -1, at).clamp(min=0)
    newest = torch.gather(dense, 2, newest[..., None].expand(*newest.shape, dense.shape[3]))
    is_there = (entry < (n_kept - q)[..., None])[..., None]
    pools.tail.copy_(torch.where(is_there, newest, 0))


def _where(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and index of what is true; waits for the device."""
    b, h, i = mask.nonzero(as_tuple=True)
    return b, h, i


def _recode_values(pools: Pools, dense: Tensor, moves: Moves, fresh: Tensor, moved: Tensor, scheme: Scheme) -> None:
    """Values are coded once, and then move as bytes."""
    source, table, next_table = moves.source, moves.table, moves.next_table
    page = pools.codes.shape[1]
    b, h, s = _where(moved)
    old = source[b, h, s]
    at = table[b, h, old // page].long(), old % page
    codes, params = pools.codes[at], pools.params[at]
    to = next_table[b, h, s // page].long(), s % page
    pools.codes[to], pools.params[to] = codes, params
    b, h, s = _where(fresh)
    values = dense[b, h, source[b, h, s]]
    codes, params = quantize_values(values, torch.ones_like(s, dtype=torch.bool), scheme)
    to = next_table[b, h, s // page].long(), s % page
    pools.codes[to], pools.params[to] = codes, params


def _recode_keys(pools: Pools, dense: Tensor, moves: Moves, groups: _Groups, scheme: Scheme) -> None:
    """Keys are coded group by group."""
    source, table, next_table = moves.source, moves.table, moves.next_table
    touched, stays, quantized, moved, moved_groups = groups
    page, group = pools.codes.shape[1], scheme.group
    per_page = page // group
    b, h, g = _where(touched)
    slots = g[:, None] * group + torch.arange(group, device=g.device)  # (touched groups, group)
    rows, heads = b[:, None], h[:, None]
    live = quantized[rows, heads, slots]
    keys = dense[rows, heads, source[rows, heads, slots].clamp(min=0)]
    old_page = table[b, h, (g // per_page).clamp(max=table.shape[2] - 1)].long()
    within = pools.params[old_page, g % per_page]
    remains = stays[rows, heads, slots].any(-1)
    within = torch.where(remains[:, None, None], within, float("nan"))
    codes, params = quantize_keys(keys, live, scheme, within[:, None])
    # Everything is read before anything is written: a new page may have been another head's.
    mb, mh, ms = _where(moved)
    codes_as_they_are = pools.codes[table[mb, mh, ms // page].long(), ms % page]
    gb, gh, gg = _where(moved_groups)
    params_as_they_are = pools.params[table[gb, gh, gg // per_page].long(), gg % per_page]
    new_page = next_table[b, h, g // per_page].long()
    pools.params[new_page, g % per_page] = params[:, 0]
    pools.codes[new_page[:, None], slots % page] = codes
    pools.codes[next_table[mb, mh, ms // page].long(), ms % page] = codes_as_they_are
    pools.params[next_table[gb, gh, gg // per_page].long(), gg % per_page] = params_as_they_are


def pools(codes: Codes) -> tuple[tuple[str, Pools], tuple[str, Pools]]:
    """Keys' and values' pools, by "k" and "v"."""
    return ("k", Pools(*codes[::2])), ("v", Pools(*codes[1::2]))


def cache_update(
    new: NewTokens,
    rows: Rows,
    cache: QuantizedCache,
    codes: Codes,
    scheme: Scheme,
    eviction: Eviction,
    ragged: Ragged = EQUAL,
) -> None:
    """See `kvrewrite::cache_update_quantized`, which this implements."""
    score_pages, pos_pages, table, lens, qlens, k_cached, v_cached = cache
    k, v, next_table, threshold = new.k, new.v, ragged.next_table, ragged.threshold
    (_, keys), (_, values) = pools(codes)
    k_cached = keys.read(table, qlens, scheme, False) if k_cached is None else k_cached
    v_cached = values.read(table, qlens, scheme, True) if v_cached is None else v_cached
    choice: Choice = choose(new, rows, cache, eviction, ragged)
    dense_k = torch.cat([k_cached, k.to(k_cached.dtype)], dim=2)
    dense_v = torch.cat([v_cached, v.to(v_cached.dtype)], dim=2)
    changed: Tensor | None = None
    if threshold is not None and bool(choice.victims.any()):
        dense_k, dense_v, changed = merge_victims(dense_k, dense_v, choice, threshold)
    written = table if next_table is None else next_table
    width = written.shape[2] * pos_pages.shape[1]
    residual = keys.tail.shape[2] - scheme.group
    source, q = place(choice.kept, choice.pos, qlens, residual, scheme.group, width)
    n_kept, dealt = choice.n_kept, choice.dealt
    moves = Moves(source, qlens, q, n_kept, table, written, dealt)
    for pool, dense in ((keys, dense_k), (values, dense_v)):
        write(pool, dense, changed, moves, scheme, pool is values)
    slot = torch.arange(width, device=table.device).expand(source.shape)
    moved = (source >= 0) & ((source != slot) if dealt is None else (source != slot) | dealt)
    index = source.clamp(min=0)
    scores = torch.gather(choice.scores, -1, index)
    places = torch.gather(choice.places, 2, index[..., None].expand(*index.shape, 2))
    pages.write(score_pages, written, slot, scores, moved)
    pages.write(pos_pages, written, slot, places, moved)
    qlens.copy_(q.to(qlens.dtype))
    lens.copy_(n_kept.to(lens.dtype))
