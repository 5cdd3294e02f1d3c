"""Append, select and compact in plain torch: which slots survive, and where they lie afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.reference import pages


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
    `sinks` positions and the `recent` (B,) newest slots of each head are protected. NaN scores count as -inf.
    """
    worth = torch.nan_to_num(scores.float(), nan=float("-inf"), posinf=3e38, neginf=-3e38)
    worth = worth.masked_fill(torch.isnan(scores), -3.3e38)
    protected = ranks_from_newest(pos, live) < recent[:, None, None]
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


def cache_update(
    k: Tensor,
    v: Tensor,
    new_scores: Tensor,
    slot_scores: Tensor | None,
    positions: Tensor,
    rotary: Tensor,
    valid: Tensor,
    keep: Tensor,
    recent: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    score_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    sinks: int,
    window: int,
    chunk: int,
) -> None:
    """See `kvrewrite::cache_update` in ops.py, which this implements."""
    b, hkv, t, _ = k.shape
    page = k_pages.shape[1]
    capacity = table.shape[2] * page
    slot = torch.arange(capacity, device=k.device)
    cached = slot < lens[..., None]
    arriving = (torch.arange(t, device=k.device) < valid[:, None])[:, None].expand(b, hkv, t)
    places_cached = torch.where(cached[..., None], pages.read(pos_pages, table), 0)
    places_new = torch.stack([positions, rotary], dim=-1).to(torch.int32)[:, None].expand(b, hkv, t, 2)
    scores_cached = pages.read(score_pages, table) if slot_scores is None else slot_scores
    pos = torch.cat([places_cached[..., 0], places_new[..., 0]], dim=-1)
    scores = torch.cat([scores_cached.float(), new_scores.float()], dim=-1)
    live = torch.cat([cached, arriving], dim=-1)
    last = (valid.long() - 1).clamp(min=0)[:, None]
    newest = torch.gather(positions.long(), 1, last)[:, 0]
    worth = priorities(scores, pos, live, newest, recent, sinks, window, chunk)
    # Rows without new tokens keep what they have.
    keep_now = torch.where((valid > 0)[:, None], keep, capacity + t)
    worth = torch.where((valid > 0)[:, None, None] | ~live, worth, 0.0)
    kept = select(worth, pos, keep_now)

    if slot_scores is not None:
        pages.write(score_pages, table, slot.expand(b, hkv, -1), slot_scores, cached)
    n_kept = kept.sum(-1)
    if not k.is_cuda and bool((n_kept > capacity).any()):  # a device can't be asked without waiting for it
        raise RuntimeError(
            f"cache overflow: {int(n_kept.max())} slots to keep, but the table holds {capacity}; lease pages first"
        )
    pools = ((k_pages, k), (v_pages, v), (score_pages, scores[..., capacity:]), (pos_pages, places_new))
    victims = cached & ~kept[..., :capacity]
    if t == 1 and not k.is_cuda and not bool((victims.sum(-1) > kept[..., capacity:].sum(-1)).any()):
        # Decoding on the CPU: one slot changes at most, so the newcomer overwrites the victim or goes behind the last.
        place = torch.where(victims.any(-1), torch.argmax(victims.to(torch.int8), dim=-1), lens.long())[..., None]
        for pool, new in pools:
            pages.write(pool, table, place, new.to(pool.dtype), kept[..., capacity:])
        lens.copy_(n_kept.to(lens.dtype))
        return
    # Everything that stays is packed to the front in order of position.
    width = capacity
    order_key = torch.where(kept, pos.long(), torch.iinfo(torch.int64).max)
    order = torch.argsort(order_key, dim=-1, stable=True)[..., :width]
    if order.shape[-1] < width:
        order = torch.nn.functional.pad(order, (0, width - order.shape[-1]))
    target = torch.arange(width, device=k.device).expand(b, hkv, width)
    # Slots that already hold the right token are left alone.
    moved = (target < n_kept[..., None]) & (order != target)
    from_cache = order < capacity
    source_cached = order.clamp(max=capacity - 1)
    source_new = (order - capacity).clamp(min=0)

    def pick(dense: Tensor, new: Tensor) -> Tensor:
        shape = (*order.shape, *dense.shape[3:])
        index_cached = source_cached.reshape(*order.shape, *(1,) * (dense.dim() - 3)).expand(shape)
        index_new = source_new.reshape(*order.shape, *(1,) * (dense.dim() - 3)).expand(shape)
        chosen = from_cache.reshape(*order.shape, *(1,) * (dense.dim() - 3))
        return torch.where(chosen, torch.gather(dense, 2, index_cached), torch.gather(new, 2, index_new))

    pages.write(k_pages, table, target, pick(pages.read(k_pages, table), k.to(k_pages.dtype)), moved)
    pages.write(v_pages, table, target, pick(pages.read(v_pages, table), v.to(v_pages.dtype)), moved)
    pages.write(score_pages, table, target, pick(scores[..., :capacity], scores[..., capacity:]), moved)
    pages.write(pos_pages, table, target, pick(places_cached, places_new), moved)
    lens.copy_(n_kept.clamp(max=capacity).to(lens.dtype))
