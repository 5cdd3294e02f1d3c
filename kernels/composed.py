"""Ops put together from several fused kernels; each is what the op's docstring says."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.attention.chunk import chunk_attention
from kvrewrite.kernels.attention.column_mass import column_mass
from kvrewrite.kernels.attention.decode import decode_attention
from kvrewrite.kernels.attention.few import few_tokens, suits
from kvrewrite.kernels.attention.gated import gated_attention
from kvrewrite.kernels.attention.sparse_chunk import sparse_attention
from kvrewrite.kernels.groups import (
    EQUAL,
    At,
    Cache,
    Dense,
    Eviction,
    KeyPages,
    KeySlots,
    Logits,
    NewTokens,
    Pages,
    Ragged,
    Rows,
    Slots,
    Tokens,
    Watch,
)
from kvrewrite.kernels.rotary.gather import gather
from kvrewrite.kernels.update.decode import decode_update
from kvrewrite.kernels.update.select import cache_update as chunk_update


def _slot_positions(pos_pages: Tensor, table: Tensor, needed: bool) -> Tensor | None:
    """Positions of cached slots (B, Hkv, C) int32, where a mask or ALiBi asks for them."""
    return pages.read(pos_pages, table)[..., 0].contiguous() if needed else None


def _gathered(dense: Dense, cache: Pages, placed: bool) -> Slots:
    """The cache's slots, but for what `dense` has of them already."""
    k_pages = cache.k_pages if dense.k_dense is None else None
    v_pages = cache.v_pages if dense.v_dense is None else None
    k_read, v_read = gather(k_pages, v_pages, cache.table, cache.lens)
    k_cache, v_cache = dense.k_dense if k_read is None else k_read, dense.v_dense if v_read is None else v_read
    assert k_cache is not None and v_cache is not None
    return Slots(k_cache, v_cache, cache.lens, _slot_positions(cache.pos_pages, cache.table, placed))


def cached_attention(
    tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits, patterns: str = ""
) -> tuple[Tensor, Tensor]:
    """One token, or a few: from the pages. More: the cache is gathered first, which costs little beside the attention.
    patterns: of a chunk that is long enough for them."""
    if patterns:
        return sparse_attention(patterns, tokens, dense, cache, at, logits)
    if tokens.q.shape[2] == 1 and logits.hidden is None:
        out, lse, _ = decode_attention(tokens, dense, cache, at, logits)
        return out, lse
    if suits(tokens, cache, logits):
        return few_tokens(tokens, dense, cache, at, logits)
    return _attend(tokens, _gathered(dense, cache, logits.placed), at, logits)


def _attend(tokens: Tokens, slots: Slots, at: At, logits: Logits) -> tuple[Tensor, Tensor]:
    return (chunk_attention if logits.hidden is None else gated_attention)(tokens, slots, at, logits)


def observe(watch: Watch, dense: Dense, cache: KeyPages, at: At, logits: Logits) -> Tensor:
    """Column mass over the gathered keys."""
    keys = dense.k_dense
    if keys is None:
        keys, _ = gather(cache.k_pages, None, cache.table, cache.lens)
        assert keys is not None
    places = _slot_positions(cache.pos_pages, cache.table, logits.placed)
    return column_mass(watch, KeySlots(keys, cache.lens, places), at, logits)


def cache_update(new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, ragged: Ragged = EQUAL) -> None:
    """Append, select and compact; for heads that do not merge slots."""
    new = NewTokens(new.k.to(cache.k_pages.dtype), new.v.to(cache.v_pages.dtype), *new[2:])
    if ragged.floor is None and ragged.spare is None and new.k.shape[2] == 1:
        decode_update(new, rows, cache, eviction)
    else:
        chunk_update(new, rows, cache, eviction, ragged)


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """A stream whose kernels go first where two could begin."""
    return torch.cuda.Stream(device, priority=-1)


def attend_and_update(
    tokens: Tokens, dense: Dense, logits: Logits, new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction
) -> tuple[Tensor, Tensor]:
    """`cached_attention` and `cache_update`. On CUDA the update, which keeps few multiprocessors busy, runs beside attention:
    that reads copies of the cache and of its lengths, made before."""
    q = tokens.q
    if (
        q.device.type != "cuda" or q.shape[2] == 1 or logits.placed or suits(tokens, cache.pages, logits)
    ):  # placed: it reads slots' positions from their pages
        out = cached_attention(tokens, dense, cache.pages, rows.at, logits)
        cache_update(new, rows, cache, eviction)
        return out
    slots = _gathered(dense, cache.pages, placed=False)._replace(lens=cache.lens.clone())
    with torch.cuda.device_of(q):
        here, beside = torch.cuda.current_stream(), _beside(q.device)
        beside.wait_stream(here)
        torch.cuda.set_stream(beside)  # scratch memory of the update comes from this stream's own and goes back to it
        try:
            cache_update(new, rows, cache, eviction)
        finally:
            torch.cuda.set_stream(here)
        updated_by_now = beside.record_event()
        try:
            return _attend(tokens, slots, rows.at, logits)
        finally:  # whoever frees or writes what the update reads does so after it
            here.wait_event(updated_by_now)
