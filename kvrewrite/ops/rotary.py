"""Operators of rotary positions: of new tokens, of cached keys, and of their ranks. Shapes as in kernels/groups.py."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import KeyRotation
from kvrewrite.kernels.rotary.reference import rotate_cached_keys
from kvrewrite.kernels.update.reference import ranks_from_newest
from kvrewrite.ops.dispatch import fused, unversioned


@torch.library.custom_op("kvrewrite::slot_rotary", mutates_args=("pos_pages",))
def slot_rotary(
    pos_pages: Tensor, table: Tensor, lens: Tensor, following: Tensor, renew: Tensor, span: Tensor | None
) -> Tensor:
    """Rotary positions of cached keys (B, Hkv, C) int64 in contiguous mode; dead slots get 0.

    Rows with renew (B,) bool are ranked again first, in place: the newest live slot of each head gets following - 1,
    the one before it following - 2, and so on; following: (B,) int64, the rotary position of the row's next token. With
    equal lengths that is 0..len-1 and queries from len on, as Locret's and StreamingLLM's code have it; heads that keep
    fewer are aligned at their end, which is the same thing because RoPE depends on differences only. span: an empty
    tensor (0, N); every position in the text is below N.
    """
    if fused("slot_rotary", pos_pages.new_empty(0, dtype=torch.float32), "no span was given" if span is None else None):
        from kvrewrite.kernels.rotary import ranks

        assert span is not None
        return ranks.slot_rotary(pos_pages, table, lens, following, renew, max_position=span.shape[1])
    places = pages.read(pos_pages, table)
    slot = torch.arange(places.shape[2], device=places.device)
    live = slot < lens[..., None]
    rank = ranks_from_newest(places[..., 0], live)
    renewed = (following[:, None, None] - 1 - rank).clamp(min=0)
    rotary = torch.where(renew[:, None, None], renewed, places[..., 1].long())
    rotary = torch.where(live, rotary, 0)
    updated = torch.stack([places[..., 0], rotary.to(torch.int32)], dim=-1)
    pages.write(pos_pages, table, slot.expand(live.shape), updated, live)
    return rotary


@slot_rotary.register_fake
def _(pos_pages, table, lens, following, renew, span):  # type: ignore[no-untyped-def]
    return table.new_empty(*table.shape[:2], table.shape[2] * pos_pages.shape[1], dtype=torch.int64)


@torch.library.custom_op("kvrewrite::slot_rotary_layers", mutates_args=("pos_pages",))
def slot_rotary_layers(
    pos_pages: Tensor, tables: Tensor, lens: Tensor, layers: int, following: Tensor, renew: Tensor, span: Tensor | None
) -> Tensor:
    """`slot_rotary` of all layers that share a pool: tables (layers, B, Hkv, P), lens (layers, B, Hkv) -> (layers, B,
    Hkv, C)."""
    flat = (tables.flatten(0, 1), lens.reshape(-1, lens.shape[2]), following.repeat(layers), renew.repeat(layers))
    # Lengths lie layer by layer in no order of their dims, which elementwise ops would hand on.
    return torch.ops.kvrewrite.slot_rotary(pos_pages, *flat, span).unflatten(0, (layers, -1)).contiguous()


@slot_rotary_layers.register_fake
def _(pos_pages, tables, lens, layers, following, renew, span):  # type: ignore[no-untyped-def]
    return tables.new_empty(*tables.shape[:3], tables.shape[3] * pos_pages.shape[1], dtype=torch.int64)


@torch.library.custom_op("kvrewrite::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, partner: Tensor) -> Tensor:
    """RoPE in the form that every variant has: y = cos[p] * x + sin[p] * x[partner], channel by channel.

    x: (B, Hkv, C, D); cos, sin: (N, D) by position (signs and scaling factors inside; cos = 1 and sin = 0 for channels
    that are not rotated); positions: (B, Hkv, C) int64 < N; partner: (D,) int64, the other channel of each channel's
    pair.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rotated = x.to(wide) * cos[positions].to(wide) + x[..., partner].to(wide) * sin[positions].to(wide)
    return rotated.to(x.dtype)


@rotate.register_fake
def _(x, cos, sin, positions, partner):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("kvrewrite::read_rotated", mutates_args=())
def read_rotated(
    k_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    partner: Tensor,
    half: int,
) -> Tensor:
    """`rotate(read_pages(k_pages, table), ...)` in one go: (B, Hkv, C, D). Dead slots may hold anything (kernel:
    zeros).

    half: h where the partners of channels 0..h-1 are h..2h-1 and no other channel is rotated, which is faster; else 0.
    """
    if fused("read_rotated", k_pages):
        from kvrewrite.kernels.rotary.gather import gather

        k_dense, _ = gather(k_pages, None, table, lens, KeyRotation(positions, cos, sin, partner, half))
        assert k_dense is not None
        return k_dense
    return torch.ops.kvrewrite.rotate(pages.read(k_pages, table), cos, sin, positions, partner)


@read_rotated.register_fake
def _(k_pages, table, lens, cos, sin, positions, partner, half):  # type: ignore[no-untyped-def]
    return k_pages.new_empty(*table.shape[:2], table.shape[2] * k_pages.shape[1], k_pages.shape[2])


def rope(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """RoPE of tokens x (B, H, T, D) whose channels' partners are half a head away; cos, sin: (B, T, D), or None: x
    itself."""
    if cos is None or sin is None:
        return x
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-high, low], -1) * sin.unsqueeze(1)


@torch.library.custom_op("kvrewrite::turn_both", mutates_args=())
def turn_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` of queries (B, H, T, D) and keys (B, Hkv, T, D) of any number of tokens; cos, sin: (B or 1, T, D). In
    memory both results are (B, T, heads, D)."""
    if fused("turn_both", q):
        from kvrewrite.kernels.rotary.rope import turn_both as kernel

        return kernel(q, k, cos, sin)
    rotated_q, rotated_k = [rope(x, cos, sin).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    return rotated_q, rotated_k


@turn_both.register_fake
def _(q, k, cos, sin):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))


@torch.library.custom_op("kvrewrite::settle_keys", mutates_args=("k_pages",))
def settle_keys(
    k_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    cos: Tensor,
    sin: Tensor,
    partner: Tensor,
    undo: bool,
) -> None:
    """Rotates the cached keys of a layer in place by their stored rotary positions, or takes that rotation back.

    Contiguous positions: once ranks are frozen, keys can lie rotated, so that decoding reads them as they are. cos,
    sin: (N, D) by position; N reaches beyond every stored position.
    """
    if fused("settle_keys", k_pages):
        from kvrewrite.kernels.rotary import rotate_cached_keys as kernel

        kernel.rotate_cached_keys(k_pages, pos_pages, table, lens, cos.contiguous(), sin.contiguous(), partner, undo)
        return
    rotate_cached_keys(k_pages, pos_pages, table, lens, cos, sin, partner, undo)


@settle_keys.register_fake
def _(k_pages, pos_pages, table, lens, cos, sin, partner, undo):  # type: ignore[no-untyped-def]
    return None


unversioned("kvrewrite::slot_rotary", "kvrewrite::slot_rotary_layers", "kvrewrite::settle_keys")
