"""The operators that rewritten graphs attend with: schemas, fakes and the dispatch to their implementations.

Only torch is imported here. Shapes: B rows, T new tokens, H query heads, Hkv kv heads, D and Dv head dims, P pages of a
head at most, PAGE slots per page, C = P * PAGE slots. All positions are those of the original text (int64), never
slots. What arguments are is written with their groups (kernels/groups.py).

Mutation is declared honestly; no op returns an alias of an argument. Never clone a cache in a graph: PyTorch turns
`y = x.clone(); op(y, x)` into `op(x, x)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvrewrite.errors import OptionError
from kvrewrite.kernels import limits, pages
from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.attention.patterns import DENSE_TOKENS
from kvrewrite.kernels.attention.sparse_index import find_visible
from kvrewrite.kernels.groups import (
    WHOLE,
    At,
    Dense,
    KeyPages,
    Logits,
    Pages,
    Placed,
    Slots,
    Sparse,
    Tokens,
    Watch,
)
from kvrewrite.ops.dispatch import fused
from kvrewrite.ops.groups import Fields, define

ALL_VISIBLE = Fields(Logits, "sinks alibi scale softcap window chunk")  # nothing is hidden


# ------------------------------------------------------------------------------------------------ source: attention
attention_op = define("attention", Tokens, ALL_VISIBLE, returns="Tensor")


@attention_op
def attention(tokens: Tokens, logits: Logits) -> Tensor:
    """Causal attention of a whole sequence on itself: what every attention site is rewritten to first.

    Returns (B, H, T, Dv). Differentiable in q, k, v and sinks.
    """
    b, hkv, t, _ = tokens.k.shape
    position = torch.arange(t, device=tokens.q.device)
    live = torch.ones(b, hkv, t, dtype=torch.bool, device=tokens.q.device)
    placed = Placed(position.expand(b, t), position.expand(b, hkv, t), live)
    return reference.attend(tokens, placed, logits, own=True)[0]


@attention_op.fake
def _(tokens: Tokens, logits: Logits) -> Tensor:
    q, v = tokens.q, tokens.v
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


def _attention_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, sinks, alibi, *ctx.shape = inputs
    ctx.save_for_backward(q, k, v, sinks, alibi)


def _attention_backward(ctx, grad):  # type: ignore[no-untyped-def]
    *inputs, alibi = ctx.saved_tensors

    def again(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return attention(Tokens(q, k, v), Logits(sinks, alibi, None, *ctx.shape))

    return (*gradients(again, inputs, ctx.needs_input_grad[:4], grad), None, None, None, None, None)


def gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of those tensors that need one, from computing the function once more."""
    given = [None if x is None else x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
    with torch.enable_grad():
        out = function(*given)
    found = iter(torch.autograd.grad(out, [x for x in given if x is not None and x.requires_grad], grad))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in given)


attention_op.gradient(_attention_backward, _attention_setup)


# ------------------------------------------------------------------------------------------------ caches
@torch.library.custom_op("kvrewrite::read_pages", mutates_args=())
def read_pages(pool: Tensor, table: Tensor) -> Tensor:
    """The slots of every head in slot order, dense: pool (pages, PAGE, ...), table (B, Hkv, P) -> (B, Hkv, C, ...)."""
    return pages.read(pool, table)


@read_pages.register_fake
def _(pool, table):  # type: ignore[no-untyped-def]
    return pool.new_empty(*table.shape[:2], table.shape[2] * pool.shape[1], *pool.shape[2:])


def _cached_keys(
    k: Tensor, cached_k: Tensor, pos_pages: Tensor, table: Tensor, lens: Tensor, at: At
) -> tuple[Tensor, Placed]:
    """Keys of [cache, new tokens], dense (B, Hkv, C + T, D), and where they and the queries stand."""
    b, hkv, t, _ = k.shape
    cached = torch.arange(cached_k.shape[2], device=k.device) < lens[..., None]
    arriving = (torch.arange(t, device=k.device) < at.valid[:, None])[:, None].expand(b, hkv, t)
    places = pages.read(pos_pages, table)[..., 0].long()
    pos = torch.cat([places, at.positions[:, None].expand(b, hkv, t)], dim=2)
    placed = Placed(at.positions, pos, torch.cat([cached, arriving], dim=2))
    return torch.cat([cached_k.to(k.dtype), k], dim=2), placed


def _beside_cache(logits: Logits, capacity: int) -> Logits:
    """The same for [cache, new tokens]: nothing that is cached is hidden."""
    if logits.hidden is None:
        return logits
    return logits._replace(hidden=torch.nn.functional.pad(logits.hidden, (capacity, 0)))


cached_attention_op = define(
    "cached_attention",
    Tokens,
    Fields(Dense, "k_dense"),
    Pages,
    At,
    Logits,
    Fields(Dense, "v_dense", optional=True),
    Fields(Sparse, optional=True),
    returns="(Tensor, Tensor)",
)


@cached_attention_op
def cached_attention(
    tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits, sparse: Sparse = WHOLE
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens on [live cache slots] + [the new tokens, causal].

    Returns out (B, H, T, Dv) and the natural log-sum-exp (B, H, T) fp32, of what the queries see. In memory `out` is
    (B, T, H, Dv), as the projection after it reads it. sparse: which keys the heads see of a chunk of more than
    `DENSE_TOKENS` tokens; causal attention without window, chunk and ALiBi only.
    """
    q, k, v = tokens
    patterns = sparse.patterns if q.shape[2] > DENSE_TOKENS else ""
    if patterns and logits.placed:
        raise OptionError("cached_attention: expected causal attention for patterns; got a window, a chunk or ALiBi")
    if fused("cached_attention", q, why_not_cached(tokens, dense, cache, logits)):
        from kvrewrite.kernels import composed

        return composed.cached_attention(tokens, dense, cache, at, logits, patterns)
    cached_k = pages.read(cache.k_pages, cache.table) if dense.k_dense is None else dense.k_dense
    keys, placed = _cached_keys(k, cached_k, cache.pos_pages, cache.table, cache.lens, at)
    cached_v = dense.v_dense
    if cached_v is None:
        latent = not cache.v_pages.shape[2]
        cached_v = cached_k[..., : v.shape[3]] if latent else pages.read(cache.v_pages, cache.table)
    values = torch.cat([cached_v.to(v.dtype), v], dim=2)
    visible = None
    if patterns:
        visible = find_visible(patterns, tokens, Slots(cached_k.to(k.dtype), cached_v, cache.lens), at, logits)
    beside = _beside_cache(logits, cached_k.shape[2])
    out, lse = reference.attend(Tokens(q, keys, values), placed, beside, own=True, visible=visible)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def why_not_cached(tokens: Tokens, dense: Dense, cache: Pages, logits: Logits) -> str | None:
    """The reason why no kernel computes `cached_attention` of these tensors, or None."""
    q, k, v = tokens
    if dense.v_dense is None and (why := limits.why_not_latent(cache.v_pages.shape[-1])):
        return why
    dims = (q.shape[3], v.shape[3], q.shape[1] // k.shape[1])
    return limits.why_not(*dims, q.shape[2], logits.hidden is not None, 8 * q.itemsize)


@cached_attention_op.fake
def _(
    tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits, sparse: Sparse = WHOLE
) -> tuple[Tensor, Tensor]:
    return fake_attended(tokens.q, tokens.v.shape[3])


def fake_attended(q: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """What `cached_attention` gives looks so."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_dim).transpose(1, 2)
    return out, q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=torch.float32)


observe_op = define(
    "observe",
    Fields(Watch, "q k lse rows"),
    Fields(Dense, "k_dense"),
    KeyPages,
    At,
    Fields(Logits, "alibi hidden scale softcap window chunk"),
    Fields(Watch, "above newest", optional=True),
    returns="Tensor",
)


@observe_op
def observe(watch: Watch, dense: Dense, cache: KeyPages, at: At, logits: Logits) -> Tensor:
    """Attention mass of every slot and new token under the query rows weighted by `rows`: (B, Hkv, C + T) fp32, summed
    over the query heads of each group. `lse` is what `cached_attention` returned."""
    q, k, lse, rows, above, newest = watch
    channels = q.shape[3]
    why = f"keys of more than {limits.MOST_CHANNELS} channels" if channels > limits.MOST_CHANNELS else None
    if fused("observe", q, why):
        from kvrewrite.kernels import composed

        return composed.observe(watch, dense, cache, at, logits)
    cached_k = pages.read(cache.k_pages, cache.table) if dense.k_dense is None else dense.k_dense
    keys, placed = _cached_keys(k, cached_k, cache.pos_pages, cache.table, cache.lens, at)
    real = torch.arange(k.shape[2], device=k.device) < at.valid[:, None]
    rows = torch.where(real, rows, torch.zeros_like(rows))
    if 0 < newest < q.shape[2]:
        index = (at.valid.long() - newest).clamp(min=0)[:, None] + torch.arange(newest, device=q.device)
        per_head = index[:, None].expand(-1, q.shape[1], -1)
        q = torch.gather(q, 2, per_head[..., None].expand(-1, -1, -1, channels))
        lse = torch.gather(lse, 2, per_head)
        placed = placed._replace(q_pos=torch.gather(placed.q_pos, 1, index))
        rows = torch.gather(rows, 1, index)
        above = None if above is None else torch.gather(above, 1, index)
    logits = _beside_cache(logits, cached_k.shape[2])
    return reference.column_mass(Watch(q, keys, lse, rows, above), placed, logits)


@observe_op.fake
def _(watch: Watch, dense: Dense, cache: KeyPages, at: At, logits: Logits) -> Tensor:
    q, k, table = watch.q, watch.k, cache.table
    size = table.shape[2] * cache.k_pages.shape[1] + k.shape[2]
    return q.new_empty(*table.shape[:2], size, dtype=torch.float32)
