"""Spans of a text: which are pinned, whether they are still held, and taking one out of a cache.

A span is [begin, end), of positions in a row's text: its first real token is at 0, padding is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvrewrite.errors import CacheError, InputError
from kvrewrite.ir.layout import PIN_SPANS
from kvrewrite.kernels import pages
from kvrewrite.kernels.quantized.reference import Moves, Pools, place, write
from kvrewrite.policies.segments import UNLIMITED

if TYPE_CHECKING:
    from kvrewrite.cache.pages import Lease
    from kvrewrite.cache.request import Request

Span = tuple[int, int]


# -- numbers -----------------------------------------------------------------------------------------------------------
def check_span(start: int, end: int) -> None:
    """Raises InputError unless it is a span."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (start, end))
    if not whole or not 0 <= start < end <= UNLIMITED:
        raise InputError(f"got the span {start!r} to {end!r}, expected whole numbers, 0 <= start < end")


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order; those that touch are one. Raises CacheError where they are too many."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    if len(found) > PIN_SPANS:
        raise CacheError(f"{len(found)} spans of a row would be pinned, expected at most {PIN_SPANS} that do not touch")
    return tuple(found)


def without(spans: Iterable[Span], start: int, end: int) -> tuple[Span, ...]:
    """Spans without what lies in another."""
    cut = [piece for a, b in spans for piece in ((a, min(b, start)), (max(a, end), b))]
    return joined(piece for piece in cut if piece[0] < piece[1])


def counted(spans: Iterable[Span], start: int, end: int) -> int:
    """How many positions of spans lie in [start, end)."""
    return sum(max(0, min(b, end) - max(a, start)) for a, b in spans)


# -- what is held ------------------------------------------------------------------------------------------------------
def lost(request: Request, row: int, start: int, end: int) -> int:
    """How many positions of a span went through a row and are no longer held by all heads of the layers without a window."""
    end = min(end, request.seen[row])
    if start >= end:
        return 0
    least = end - start
    for lease in request.leases:
        for i in np.flatnonzero(lease.windows == 0):
            inside = _inside(lease, int(i), start, end, [row])[row]
            least = min(least, int(inside.sum(-1).min()))
    return end - start - least


def _inside(lease: Lease, layer: int, start: int, end: int, rows: Sequence[int]) -> Tensor:
    """Which slots of a layer lie in a span of some rows: (B, Hkv, C) bool."""
    places = pages.read(lease.store.pos_pages, lease.table[layer])[..., 0]
    live = torch.arange(places.shape[2], device=places.device) < lease.lens[layer][..., None]
    chosen = torch.zeros(lease.batch, dtype=torch.bool)
    chosen[list(rows)] = True
    return live & (places >= start) & (places < end) & chosen.to(places.device)[:, None, None]


# -- taking a span out -------------------------------------------------------------------------------------------------
def drop(request: Request, start: int, end: int, rows: Sequence[int]) -> None:
    """Takes a span out of rows: its slots are gone, those after them move up, and pages that are empty then go back."""
    for lease in request.leases:
        lease.lens  # noqa: B018 (a decoding graph gives back lengths and states)
    states = {state.input: state.value for state in request.states}
    for lease in request.leases:
        lease.unshare(np.zeros_like(lease.bound))
        for i, layer in enumerate(lease.layers):
            gone = _inside(lease, i, start, end, rows)
            live = torch.arange(gone.shape[2], device=gone.device) < lease.lens[i][..., None]
            if request.layout.quantize is None:
                source = torch.argsort((~(live & ~gone)).to(torch.int8), dim=-1, stable=True)
                for name in lease.store.shapes:
                    _move(lease, i, name, source, (live & ~gone).sum(-1))
            else:
                _move_quantized(request, lease, i, live & ~gone, {k: states[f"state_{k}_{layer}"] for k in TAILS})
            lease.lens[i].copy_((live & ~gone).sum(-1))
        lease.resize(lease.lens.cpu().numpy().astype(np.int64), 0)


TAILS = ("k_tail", "v_tail", "qlens")


def _move(lease: Lease, layer: int, pool: str, source: Tensor, held: Tensor) -> None:
    """Slot i of each head, of `held` (B, Hkv), becomes what slot source[i] was, (B, Hkv, C)."""
    values, table = getattr(lease.store, pool), lease.table[layer]
    old, slot = pages.read(values, table), torch.arange(source.shape[2], device=source.device)
    index = source.clamp(min=0).reshape(*source.shape, *(1,) * (old.dim() - 3)).expand(*source.shape, *old.shape[3:])
    moved = (source != slot) & (slot < held[..., None])
    pages.write(values, table, slot.expand(source.shape), torch.gather(old, 2, index), moved)


def _move_quantized(request: Request, lease: Lease, layer: int, kept: Tensor, tails: dict[str, Tensor]) -> None:
    """The same by the rule of quantized caches (kernels/quantized/reference.py): codes stay where they are."""
    store, table, scheme = lease.store, lease.table[layer], request.layout.scheme
    assert scheme is not None and request.layout.quantize is not None
    positions, qlens = pages.read(store.pos_pages, table)[..., 0], tails["qlens"]
    source, q = place(kept, positions, qlens, request.layout.quantize.residual, scheme.group, kept.shape[2])
    moves = Moves(source, qlens, q, kept.sum(-1), table, table, None)
    for x in "kv":
        pool = Pools(getattr(store, f"{x}_pages"), getattr(store, f"{x}_params"), tails[f"{x}_tail"])
        write(pool, pool.read(table, qlens, scheme, x == "v"), None, moves, scheme, x == "v")
    for name in ("score_pages", "pos_pages"):
        _move(lease, layer, name, source, kept.sum(-1))
    qlens.copy_(q.to(qlens.dtype))
