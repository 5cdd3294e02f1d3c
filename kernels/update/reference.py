"""Append, select and compact in plain torch: which slots survive, and where they lie afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import EQUAL, Cache, Eviction, NewTokens, QuantizedCache, Ragged, Rows
from kvrewrite.kernels.update.merge import merge


def ranks_from_newest(pos: Tensor, live: Tensor) -> Tensor:
    """For each slot, how many live slots of its head hold a later position; dead slots get a large number."""
    key = torch.where(live, pos.long(), -1)
    order = torch.argsort(key, dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(pos.shape[-1], device=pos.device).expand_as(order))
    return torch.where(live, rank, pos.shape[-1] + 1)


def priorities(
    scores: Tensor, pos: Tensor, live: Tensor, newest: Tensor, recent: Tensor, sinks: int, window: int, chunk: int
) -> Tensor:
    """What a slot is worth (B, Hkv, N) fp64-free: -inf for slots that may go at once, +inf for protected ones.

    Slots that no later query can see (outside the window or chunk of the next position) are worth -inf; the first
    `sinks` positions and the `recent` (B, Hkv) newest slots of each head are protected. NaN scores count as -inf.
    """
    worth = torch.nan_to_num(scores.float(), nan=float("-inf"), posinf=3e38, neginf=-3e38)
    worth = worth.masked_fill(torch.isnan(scores), -3.3e38)
    protected = ranks_from_newest(pos, live) < recent[..., None]
    if sinks:
        protected |= pos < sinks
    worth = worth.masked_fill(protected, float("inf"))
    return worth.masked_fill(~visible_later(pos, live, newest, window, chunk), float("-inf"))


def visible_later(pos: Tensor, live: Tensor, newest: Tensor, window: int, chunk: int) -> Tensor:
    """Which live slots the query at position newest + 1 can still see; newest: (B,)."""
    seen = live
    following = newest[:, None, None] + 1
    if window:
        seen = seen & (following - pos < window)
    if chunk:
        seen = seen & (pos // chunk == following // chunk)
    return seen


def select(worth: Tensor, pos: Tensor, keep: Tensor) -> Tensor:
    """The slots that survive (B, Hkv, N) bool: the `keep` (B, Hkv) worthiest; of equals, the earlier position."""
    by_position = torch.argsort(pos, dim=-1, stable=True)
    order = torch.argsort(torch.gather(worth, -1, by_position), dim=-1, descending=True, stable=True)
    order = torch.gather(by_position, -1, order)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(pos.shape[-1], device=pos.device).expand_as(order))
    return (place < keep[..., None]) & (worth > float("-inf"))


def head_budgets(worth: Tensor, pos: Tensor, keep: Tensor, floor: Tensor) -> Tensor:
    """Ada-KV's budgets of the heads of a layer (arXiv 2407.11550, algorithm 1; code FFY0/AdaKV): (B, Hkv).

    The unprotected slots of all heads compete for the sum of the heads' unprotected budgets; what a head wins is
    blended with its equal share, of which `floor` (B,) float64 is safe: keep = protected + round((1 - floor) * won +
    int(floor * share)), halves to the even number. worth as `priorities` gives it; of equal scores the lower head and
    the earlier position wins.
    """
    b, hkv, n = worth.shape
    protected = (worth == float("inf")).sum(-1)
    share = (keep - protected).clamp(min=0)
    by_position = torch.argsort(pos, dim=-1, stable=True)
    ordered = torch.gather(worth, -1, by_position)
    contenders = torch.where(ordered == float("inf"), float("-inf"), ordered).reshape(b, hkv * n)
    order = torch.argsort(contenders, dim=-1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(hkv * n, device=worth.device).expand_as(order))
    won = ((place < share.sum(-1)[:, None]) & (contenders > float("-inf"))).reshape(b, hkv, n).sum(-1)
    blended = torch.round(won.double() * (1 - floor)[:, None] + torch.floor(floor[:, None] * share.double())).long()
    there = (worth > float("-inf")).sum(-1)
    # A layer whose heads are all within their budgets loses nothing (rounding down could).
    fits = (there <= keep).all(-1, keepdim=True)
    return torch.where(fits, there, torch.minimum(protected + blended, there))


def deal_pages(n_kept: Tensor, spare: Tensor, table: Tensor, next_table: Tensor, page: int) -> Tensor:
    """Fills in next_table (B, Hkv, W): the pages `spare` (B, W) one after the other to the heads that need them for
    n_kept (B, Hkv) slots; rows without spare pages keep theirs. Returns which rows were dealt new ones (B,) bool."""
    dealt = spare[:, 0] >= 0
    need = -(-n_kept // page)
    if not spare.is_cuda and bool((dealt & (need.sum(-1) > (spare >= 0).sum(-1))).any()):
        raise RuntimeError(
            f"cache overflow: {need.sum(-1).tolist()} pages needed, {(spare >= 0).sum(-1).tolist()} offered"
        )
    start = torch.cumsum(need, dim=-1) - need
    column = torch.arange(next_table.shape[2], device=table.device)
    source = (start[..., None] + column).clamp(max=spare.shape[1] - 1)
    new = torch.gather(spare[:, None].expand(-1, table.shape[1], -1), 2, source)
    new = torch.where(column < need[..., None], new, 0)
    old = torch.nn.functional.pad(table, (0, next_table.shape[2] - table.shape[2]))
    next_table.copy_(torch.where(dealt[:, None, None], new, old))
    return dealt


@dataclass
class Choice:
    """Which of [C cached slots, T new tokens] of every head stay, and what they are besides keys and values."""

    kept: Tensor  # (B, Hkv, C + T) bool
    pos: Tensor  # (B, Hkv, C + T) position in the text
    scores: Tensor  # (B, Hkv, C + T) fp32, as they are stored from now on
    places: Tensor  # (B, Hkv, C + T, 2) int32: position in the text, position of the rotation
    victims: Tensor  # (B, Hkv, C + T) bool: what goes though a later query could still see it
    n_kept: Tensor  # (B, Hkv)
    dealt: Tensor | None  # (B, 1, 1) bool: rows whose slots move to the pages of next_table; None: none can


def choose(new: NewTokens, rows: Rows, cache: Cache | QuantizedCache, eviction: Eviction, ragged: Ragged) -> Choice:
    """What `cache_update` keeps. Fills in next_table, and stores slot_scores; everything else stays as it is."""
    _, _, new_scores, slot_scores = new
    positions, rotary, valid, keep, recent = rows
    score_pages, pos_pages, table, lens = cache.score_pages, cache.pos_pages, cache.table, cache.lens
    sinks, window, chunk, select_by, drop = eviction
    floor, spare, next_table, _ = ragged
    b, hkv, t = new_scores.shape
    page, device = pos_pages.shape[1], table.device
    capacity = table.shape[2] * page
    slot = torch.arange(capacity, device=device)
    cached = slot < lens[..., None]
    arriving = (torch.arange(t, device=device) < valid[:, None])[:, None].expand(b, hkv, t)
    if drop is not None:
        arriving = arriving & ~drop
    places_cached = torch.where(cached[..., None], pages.read(pos_pages, table), 0)
    places_new = torch.stack([positions, rotary], dim=-1).to(torch.int32)[:, None].expand(b, hkv, t, 2)
    places = torch.cat([places_cached, places_new], dim=2)
    scores_cached = pages.read(score_pages, table) if slot_scores is None else slot_scores
    pos = places[..., 0]
    scores = torch.cat([scores_cached.float(), new_scores.float()], dim=-1)
    live = torch.cat([cached, arriving], dim=-1)
    last = (valid.long() - 1).clamp(min=0)[:, None]
    newest = torch.gather(positions.long(), 1, last)[:, 0]
    busy = valid > 0
    seen = visible_later(pos, live, newest, window, chunk)
    # A device can't be asked without waiting for it.
    if not table.is_cuda and bool(((seen.sum(-1) <= keep) | ~busy[:, None]).all()):
        # Nothing is over its budget: scores do not matter. Rows without new tokens keep what they have.
        kept, victims = torch.where(busy[:, None, None], seen, live), torch.zeros_like(live)
    else:
        by = scores if select_by is None else select_by
        # The newest that are protected may not push each other out: beside the first ones there is room for so many.
        first = (seen & (pos < sinks)).sum(-1)
        safe = torch.minimum(recent[:, None].long(), (keep.long() - first).clamp(min=0))
        worth = priorities(by, pos, live, newest, safe, sinks, window, chunk)
        keep_now = torch.where(busy[:, None], keep, capacity + t)
        worth = torch.where(busy[:, None, None] | ~live, worth, 0.0)
        if floor is not None:
            shared = head_budgets(worth, pos, keep, floor.clamp(min=0))
            keep_now = torch.where((busy & (floor >= 0))[:, None], shared, keep_now)
        kept = select(worth, pos, keep_now)
        victims = seen & ~kept & busy[:, None, None]

    n_kept = kept.sum(-1)
    dealt = None
    if spare is not None and next_table is not None:
        dealt = deal_pages(n_kept, spare, table, next_table, page)[:, None, None]
        room = torch.where(dealt[:, 0], n_kept, capacity)
    else:
        room = torch.full_like(n_kept, capacity)
    if slot_scores is not None:
        mine = cached if dealt is None else cached & ~dealt
        pages.write(score_pages, table, slot.expand(b, hkv, -1), slot_scores, mine)
    if not table.is_cuda and bool((n_kept > room).any()):  # a device can't be asked without waiting for it
        raise RuntimeError(
            f"cache overflow: {int(n_kept.max())} slots to keep, but the table holds {capacity}; lease pages first"
        )
    return Choice(kept, pos, scores, places, victims, n_kept, dealt)


def merge_victims(k: Tensor, v: Tensor, choice: Choice, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges what goes into what stays: new k and v (B, Hkv, C + T, ...), and which slots have changed (B, Hkv, C + T).

    threshold (B,) fp32 is renewed in place; a device is asked once how many tokens go.
    """
    merged_k, merged_v, renewed = merge(k, v, choice.kept, choice.victims, choice.pos, threshold)
    threshold.copy_(renewed)
    changed = (merged_k != k).any(-1) | (merged_v != v).any(-1)
    return merged_k, merged_v, changed & choice.kept


def append(new: NewTokens, rows: Rows, cache: Cache) -> None:
    """Writes each row's `valid` first new tokens after the last slot of every head; reads no slots. See
    `kvrewrite::append_slots`. `slot_scores` stays out."""
    lens = cache.lens
    (b, hkv, t), device = new.new_scores.shape, lens.device
    token = torch.arange(t, device=device)
    arriving = (token < rows.valid[:, None])[:, None].expand(b, hkv, t)
    where = pages.address(cache.table, lens.long()[..., None] + token, arriving, cache.pos_pages.shape[1])
    places = torch.stack([rows.positions, rows.rotary], dim=-1).to(torch.int32)[:, None].expand(b, hkv, t, 2)
    added = (new.k, new.v, new.new_scores, places)
    for pool, values in zip((cache.k_pages, cache.v_pages, cache.score_pages, cache.pos_pages), added):
        pages.put(pool, where, values)
    lens.add_(rows.valid[:, None].to(lens.dtype))


def only_appends(rows: Rows, cache: Cache, eviction: Eviction, ragged: Ragged) -> bool:
    """Whether nothing goes and no page is dealt, as far as that can be told without looking at slots. Asks the device."""
    valid, lens = rows.valid, cache.lens
    if eviction.drop is not None or (ragged.spare is not None and bool((ragged.spare[:, 0] >= 0).any())):
        return False
    last = (valid.long() - 1).clamp(min=0)[:, None]
    following = torch.gather(rows.positions.long(), 1, last) + 1
    if any(span and bool((following >= span).any()) for span in (eviction.window, eviction.chunk)):
        return False
    held = lens + valid[:, None]
    fits = (held <= rows.keep) & (held <= cache.table.shape[2] * cache.pos_pages.shape[1])
    return bool((fits | (valid == 0)[:, None]).all())


def cache_update(new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, ragged: Ragged = EQUAL) -> None:
    """See `kvrewrite::cache_update`, which this implements."""
    if not new.k.is_cuda and only_appends(rows, cache, eviction, ragged):
        if new.slot_scores is not None:
            slot = torch.arange(new.slot_scores.shape[2], device=cache.lens.device)
            live = slot < cache.lens[..., None]
            pages.write(cache.score_pages, cache.table, slot.expand_as(live), new.slot_scores, live)
        if ragged.next_table is not None:
            more = ragged.next_table.shape[2] - cache.table.shape[2]
            ragged.next_table.copy_(torch.nn.functional.pad(cache.table, (0, more)))
        append(new, rows, cache)
        return
    choice = choose(new, rows, cache, eviction, ragged)
    k, v, next_table, threshold = new.k, new.v, ragged.next_table, ragged.threshold
    k_pages, v_pages, score_pages, pos_pages, table, lens = cache
    b, hkv, t, _ = k.shape
    page, kept, dealt, n_kept = k_pages.shape[1], choice.kept, choice.dealt, choice.n_kept
    capacity = table.shape[2] * page
    k, v = k.to(k_pages.dtype), v.to(v_pages.dtype)
    dense: tuple[Tensor, Tensor] | None = None
    changed: Tensor | None = None
    if threshold is not None and bool(choice.victims.any()):
        k_all = torch.cat([pages.read(k_pages, table), k], dim=2)
        v_all = torch.cat([pages.read(v_pages, table), v], dim=2)
        k_all, v_all, changed = merge_victims(k_all, v_all, choice, threshold)
        k, v, dense = k_all[:, :, capacity:], v_all[:, :, capacity:], (k_all[:, :, :capacity], v_all[:, :, :capacity])
    news = (
        (k_pages, k),
        (v_pages, v),
        (score_pages, choice.scores[..., capacity:]),
        (pos_pages, choice.places[:, :, capacity:]),
    )
    victims = (torch.arange(capacity, device=k.device) < lens[..., None]) & ~kept[..., :capacity]
    in_place = t == 1 and not k.is_cuda and (dealt is None or not bool(dealt.any()))
    if in_place and not bool((victims.sum(-1) > kept[..., capacity:].sum(-1)).any()):
        # Decoding on the CPU: one slot changes at most, so the new token overwrites the victim or goes after the last.
        place = torch.where(victims.any(-1), torch.argmax(victims.to(torch.int8), dim=-1), lens.long())[..., None]
        where = pages.address(table, place, kept[..., capacity:], page)
        for pool, added in news:
            pages.put(pool, where, added)
        if dense is not None and changed is not None:
            slot = torch.arange(capacity, device=k.device).expand(b, hkv, -1)
            for pool, merged in zip((k_pages, v_pages), dense):
                pages.write(pool, table, slot, merged, changed[..., :capacity])
        lens.copy_(n_kept.to(lens.dtype))
        return
    # Everything that stays is packed to the front in order of position.
    width = capacity if next_table is None else next_table.shape[2] * page
    order_key = torch.where(kept, choice.pos.long(), torch.iinfo(torch.int64).max)
    order = torch.argsort(order_key, dim=-1, stable=True)[..., :width]
    if order.shape[-1] < width:
        order = torch.nn.functional.pad(order, (0, width - order.shape[-1]))
    target = torch.arange(width, device=k.device).expand(b, hkv, width)
    # Slots that already hold the right token are left alone, unless their pages are new.
    moved = order != target
    if dealt is not None:
        moved = moved | dealt
    if changed is not None:
        moved = moved | torch.gather(changed, -1, order)
    moved = moved & (target < n_kept[..., None])
    from_cache = order < capacity
    source_cached = order.clamp(max=capacity - 1)
    source_new = (order - capacity).clamp(min=0)
    written = table if next_table is None else next_table

    def pick(old: Tensor, new: Tensor) -> Tensor:
        shape = (*order.shape, *old.shape[3:])
        index_cached = source_cached.reshape(*order.shape, *(1,) * (old.dim() - 3)).expand(shape)
        index_new = source_new.reshape(*order.shape, *(1,) * (old.dim() - 3)).expand(shape)
        chosen = from_cache.reshape(*order.shape, *(1,) * (old.dim() - 3))
        return torch.where(chosen, torch.gather(old, 2, index_cached), torch.gather(new, 2, index_new))

    olds = (None, None, choice.scores[..., :capacity], choice.places[:, :, :capacity])
    where = pages.address(written, target, moved, page)
    for (pool, added), old in zip(news, olds if dense is None else (*dense, *olds[2:])):
        pages.put(pool, where, pick(pages.read(pool, table) if old is None else old, added))
    lens.copy_((n_kept if next_table is not None else n_kept.clamp(max=capacity)).to(lens.dtype))
