"""The operators that write to caches: append, evict and compact. Shapes and groups as in kernels/groups.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvrewrite.kernels.groups import EQUAL, Cache, Eviction, NewTokens, Preceding, Ragged, Rows
from kvrewrite.kernels.limits import why_not_latent
from kvrewrite.kernels.update import reference
from kvrewrite.ops.dispatch import fused
from kvrewrite.ops.groups import Fields, define
from kvrewrite.ops.linear import ACTIVATIONS
from kvrewrite.ops.rotary import rope

EVICTION = Fields(Eviction, "sinks=protected_first window chunk select drop")
POOLS = ("k_pages", "v_pages", "score_pages", "pos_pages", "lens")

cache_update_op = define(
    "cache_update",
    NewTokens,
    Rows,
    Cache,
    EVICTION,
    Ragged,
    returns="()",
    writes=(*POOLS, "next_table", "threshold"),
)


@cache_update_op
def cache_update(new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, ragged: Ragged = EQUAL) -> None:
    """Appends the valid new tokens and keeps, in every head, the `keep` slots of highest score.

    Protected: positions below `protected_first` and the `recent` newest slots of each head. Of equal scores the earlier
    position stays. NaN scores count as the lowest. Afterwards slots [0, lens) of each head are live. A latent cache has
    no values beside its keys: v (B, 1, T, 0), v_pages (pages, PAGE, 0).
    """
    why = "merging" if ragged.threshold is not None else why_not_latent(cache.v_pages.shape[-1])
    if fused("cache_update", new.k, why):
        from kvrewrite.kernels import composed

        composed.cache_update(new, rows, cache, eviction, ragged)
        return
    reference.cache_update(new, rows, cache, eviction, ragged)


@cache_update_op.fake
def _(new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, ragged: Ragged) -> None:
    return None


append_slots_op = define(
    "append_slots",
    Fields(NewTokens, "k v"),
    Fields(Rows, "positions rotary valid"),
    Cache,
    returns="()",
    writes=POOLS,
)


@append_slots_op
def append_slots(new: NewTokens, rows: Rows, cache: Cache) -> None:
    """`cache_update` where nothing goes and scores never matter: each row's `valid` new tokens come after the last slot of
    every head, with a score of 0. The caller has leased the pages.
    """
    if fused("append_slots", new.k, why_not_latent(cache.v_pages.shape[-1])):
        from kvrewrite.kernels.update.append import append

        append(new, rows, cache)
        return
    none = torch.zeros(new.k.shape[:3], dtype=torch.float32, device=new.k.device)
    reference.append(new._replace(new_scores=none), rows, cache)


@append_slots_op.fake
def _(new: NewTokens, rows: Rows, cache: Cache) -> None:
    return None


@torch.library.custom_op("kvrewrite::entering", mutates_args=())
def entering(positions: Tensor, valid: Tensor, ends: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of an update stand if those of some rows repeat the text (ends (B,) int32 is not 0) and must not
    enter the cache: positions (B, T), valid (B,) and drop (B, kv_heads, T) for `cache_update`.

    To the update such a row has one token, the last of its text once more, which is dropped: what later queries see is
    counted from there.
    """
    again = ends > 0
    tokens = torch.where(again, valid.clamp(max=1), valid)
    drop = again[:, None, None].expand(-1, kv_heads, positions.shape[1]).contiguous()
    return positions - again[:, None].long(), tokens, drop


@entering.register_fake
def _(positions, valid, ends, kv_heads):  # type: ignore[no-untyped-def]
    drop = positions.new_empty(positions.shape[0], kv_heads, positions.shape[1], dtype=torch.bool)
    return torch.empty_like(positions), torch.empty_like(valid), drop


token_update_op = define(
    "token_update",
    Fields(NewTokens, "k v scores=new_scores slot_scores"),
    Rows,
    Cache,
    EVICTION,
    Fields(Preceding, "head activation cos sin"),
    "bool ranks=False",
    returns="()",
    writes=POOLS,
)


@token_update_op
def token_update(
    new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, preceding: Preceding, ranks: bool
) -> None:
    """`cache_update` of one new token per row (T = 1), of heads that neither share budgets nor merge, and what precedes
    it.

    head: (Hkv, W), contiguous: then scores (B, 1, W) is the hidden layer of a retaining head, whose scores are
    act(scores) head^T; activation: one of ops.linear.ACTIVATIONS. cos, sin: (B, 1, D): then k comes unrotated and is
    cached rotated by `rope`.

    ranks: the second position of a slot says how many live slots of its head are newer: it is that of the newest token
    of the text, `positions`, minus their number. New tokens come with rotary = positions. When a slot goes, those that
    are older come one nearer, and all do when a new token does not enter.
    """
    if fused("token_update", new.k, why_not_latent(cache.v_pages.shape[-1])):
        from kvrewrite.kernels.update.decode import decode_update

        stored = NewTokens(new.k.to(cache.k_pages.dtype), new.v.to(cache.v_pages.dtype), *new[2:])
        decode_update(stored, rows, cache, eviction, preceding, ranks)
        return
    scores, (head, activation, cos, sin) = new.new_scores, preceding
    if head is not None:
        scores = linear(ACTIVATIONS[activation](scores), head).transpose(1, 2).to(torch.float32)
    cache_update(new._replace(k=rope(new.k, cos, sin), new_scores=scores), rows, cache, eviction)
    if ranks:
        # Computed again for all slots: a head's newest one has the position of the newest token.
        following, renew = rows.positions[:, 0] + 1, rows.valid > 0
        torch.ops.kvrewrite.slot_rotary(cache.pos_pages, cache.table, cache.lens, following, renew, None)


@token_update_op.fake
def _(new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, preceding: Preceding, ranks: bool) -> None:
    return None
