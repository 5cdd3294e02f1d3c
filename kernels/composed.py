"""Ops put together from several fused kernels; each is what the op's docstring says."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.attention.chunk import chunk_attention
from kvrewrite.kernels.attention.column_mass import column_mass
from kvrewrite.kernels.attention.decode import decode_attention
from kvrewrite.kernels.attention.gated import gated_attention
from kvrewrite.kernels.rotary.gather import gather
from kvrewrite.kernels.update.decode import decode_update
from kvrewrite.kernels.update.select import cache_update as chunk_update


def _slot_positions(pos_pages: Tensor, table: Tensor, needed: bool) -> Tensor | None:
    """Positions of cached slots (B, Hkv, C) int32, where a mask or ALiBi asks for them."""
    return pages.read(pos_pages, table)[..., 0].contiguous() if needed else None


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_dense: Tensor | None, k_pages: Tensor, v_pages: Tensor, pos_pages: Tensor,
    table: Tensor, lens: Tensor, positions: Tensor, valid: Tensor, sinks: Tensor | None, alibi: Tensor | None,
    hidden: Tensor | None, scale: float, softcap: float, window: int, chunk: int, v_dense: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token: from the pages. More: the cache is gathered first, which costs little beside the attention."""
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "chunk": chunk}
    if q.shape[2] == 1 and hidden is None:
        out, lse, _ = decode_attention(
            q,
            k,
            v,
            k_dense,
            v_dense,
            k_pages,
            v_pages,
            pos_pages,
            table,
            lens,
            positions,
            valid,
            sinks,
            alibi,
            **options,
        )
        return out, lse
    k_read, v_read = gather(k_pages if k_dense is None else None, v_pages if v_dense is None else None, table, lens)
    k_cache, v_cache = k_dense if k_read is None else k_read, v_dense if v_read is None else v_read
    assert k_cache is not None and v_cache is not None
    cache_pos = _slot_positions(pos_pages, table, bool(window or chunk or alibi is not None))
    rest = (lens, cache_pos, positions, valid, sinks, alibi)
    if hidden is not None:
        return gated_attention(q, k, v, k_cache, v_cache, *rest, hidden, **options)
    return chunk_attention(q, k, v, k_cache, v_cache, *rest, None, **options)


def observe(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, k_dense: Tensor | None, k_pages: Tensor, pos_pages: Tensor,
    table: Tensor, lens: Tensor, positions: Tensor, valid: Tensor, alibi: Tensor | None, hidden: Tensor | None, scale: float,
    softcap: float, window: int, chunk: int, above: Tensor | None, newest: int,
) -> Tensor:  # fmt: skip
    """Column mass over the gathered keys."""
    if k_dense is None:
        k_dense, _ = gather(k_pages, None, table, lens)
        assert k_dense is not None
    cache_pos = _slot_positions(pos_pages, table, bool(window or chunk or alibi is not None))
    return column_mass(
        q, k, lse, rows, k_dense, lens, cache_pos, positions, valid, alibi, hidden, above, scale=scale, softcap=softcap,
        window=window, chunk=chunk, newest=newest,
    )  # fmt: skip


def cache_update(
    k: Tensor, v: Tensor, new_scores: Tensor, slot_scores: Tensor | None, positions: Tensor, rotary: Tensor, valid: Tensor,
    keep: Tensor, recent: Tensor, k_pages: Tensor, v_pages: Tensor, score_pages: Tensor, pos_pages: Tensor, table: Tensor,
    lens: Tensor, sinks: int, window: int, chunk: int, select: Tensor | None, drop: Tensor | None, floor: Tensor | None,
    spare: Tensor | None, next_table: Tensor | None,
) -> None:  # fmt: skip
    """Append, select and compact; for heads that do not merge slots."""
    rows = (k.to(k_pages.dtype), v.to(v_pages.dtype), new_scores, slot_scores, positions, rotary, valid, keep, recent)
    pools = (k_pages, v_pages, score_pages, pos_pages, table, lens)
    options: dict[str, Any] = {"sinks": sinks, "window": window, "chunk": chunk, "select": select, "drop": drop}
    if floor is None and spare is None and k.shape[2] == 1:
        decode_update(*rows, *pools, **options)
    else:
        chunk_update(*rows, *pools, **options, floor=floor, spare=spare, next_table=next_table)


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """A stream whose kernels go first where two could begin."""
    return torch.cuda.Stream(device, priority=-1)


def attend_and_update(attended: tuple[Any, ...], updated: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """`cached_attention` and `cache_update` with their arguments. On CUDA the update, which keeps few multiprocessors busy, runs
    beside attention: that reads copies of the cache and of its lengths, made before."""
    q, _, _, k_dense, k_pages, v_pages, _, table, lens = attended[:9]
    alibi, window, chunk, v_dense = attended[12], *attended[16:]
    placed = window or chunk or alibi is not None  # attention reads the positions of slots from their pages
    if q.device.type != "cuda" or q.shape[2] == 1 or placed:
        out = cached_attention(*attended)
        cache_update(*updated)
        return out
    k_read, v_read = gather(k_pages if k_dense is None else None, v_pages if v_dense is None else None, table, lens)
    k_cache, v_cache = k_dense if k_read is None else k_read, v_dense if v_read is None else v_read
    copied: tuple[Any, ...] = (*attended[:3], k_cache, *attended[4:8], lens.clone(), *attended[9:18], v_cache)
    with torch.cuda.device_of(q):
        here, beside = torch.cuda.current_stream(), _beside(q.device)
        beside.wait_stream(here)
        torch.cuda.set_stream(beside)  # scratch memory of the update comes from this stream's own and goes back to it
        try:
            cache_update(*updated)
        finally:
            torch.cuda.set_stream(here)
        updated_by_now = beside.record_event()
        try:
            return cached_attention(*copied)
        finally:  # whoever frees or writes what the update reads does so behind it
            here.wait_event(updated_by_now)
