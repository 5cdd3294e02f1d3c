"""The operators that rewritten graphs are made of: schemas, fakes and the dispatch to their implementations.

Only torch is imported here. Shapes: B rows, T new tokens, H query heads, Hkv kv heads, D and Dv head dims, P pages of a
head at most, PAGE slots a page, C = P * PAGE slots. All positions are those of the original text (int64), never slots.

Mutation is declared honestly; no op returns an alias of an argument. Never clone a cache in a graph: PyTorch turns
`y = x.clone(); op(y, x)` into `op(x, x)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.attention import reference as reference_attention
from kvrewrite.kernels.limits import MOST_CHANNELS, missing_attention
from kvrewrite.kernels.quantized import reference
from kvrewrite.kernels.quantized.scheme import Scheme
from kvrewrite.kernels.quantized.split import missing as missing_quantized
from kvrewrite.kernels.update import reference as reference_evict
from kvrewrite.ops.dispatch import fused, latent_values
from kvrewrite.ops.unversioned import unversioned

NAMESPACE = "kvrewrite"


# ------------------------------------------------------------------------------------------------ source: attention
@torch.library.custom_op("kvrewrite::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
) -> Tensor:
    """Causal attention of a whole sequence on itself: what every attention site is rewritten to first.

    q: (B, H, T, D); k: (B, Hkv, T, D); v: (B, Hkv, T, Dv); sinks: (H,) extra logits in the denominator; alibi: (H,)
    slopes m, adding -m * (query position - key position). scale multiplies the logits, then softcap * tanh(x / softcap)
    (0: none), then the mask: causal, within `window` tokens (0: none), within chunks of `chunk` tokens (0: none).
    Returns (B, H, T, Dv). Differentiable in q, k, v and sinks.
    """
    return _attention(q, k, v, sinks, alibi, scale, softcap, window, chunk)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
) -> Tensor:
    b, hkv, t, _ = k.shape
    position = torch.arange(t, device=q.device)
    out, _ = reference_attention.attend(
        q,
        k,
        v,
        position.expand(b, t),
        position.expand(b, hkv, t),
        torch.ones(b, hkv, t, dtype=torch.bool, device=q.device),
        sinks=sinks,
        alibi=alibi,
        hidden=None,
        scale=scale,
        softcap=softcap,
        window=window,
        chunk=chunk,
        own=True,
    )
    return out


@attention.register_fake
def _(q, k, v, sinks, alibi, scale, softcap, window, chunk):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


def _attention_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, sinks, alibi, *rest = inputs
    ctx.save_for_backward(q, k, v, sinks, alibi)
    ctx.rest = rest


def _attention_backward(ctx, grad):  # type: ignore[no-untyped-def]
    *inputs, alibi = ctx.saved_tensors
    needed = [
        None if x is None else x.detach().requires_grad_(n)
        for x, n in zip(inputs, ctx.needs_input_grad[:4], strict=True)
    ]
    with torch.enable_grad():
        out = _attention(*needed, alibi, *ctx.rest)  # type: ignore[misc, arg-type, call-arg]
    wanted = [x for x in needed if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad))
    grads = [next(found) if x is not None and x.requires_grad else None for x in needed]
    return (*grads, None, None, None, None, None)


attention.register_autograd(_attention_backward, setup_context=_attention_setup)


# ------------------------------------------------------------------------------------------------ caches
def _cached_keys(
    k: Tensor, cached_k: Tensor, pos_pages: Tensor, table: Tensor, lens: Tensor, positions: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, positions and liveness of [cache, new tokens], dense: (B, Hkv, C + T, ...)."""
    b, hkv, t, _ = k.shape
    cached = torch.arange(cached_k.shape[2], device=k.device) < lens[..., None]
    arriving = (torch.arange(t, device=k.device) < valid[:, None])[:, None].expand(b, hkv, t)
    pos = torch.cat([pages.read(pos_pages, table)[..., 0].long(), positions[:, None].expand(b, hkv, t)], dim=2)
    return torch.cat([cached_k.to(k.dtype), k], dim=2), pos, torch.cat([cached, arriving], dim=2)


@torch.library.custom_op("kvrewrite::read_pages", mutates_args=())
def read_pages(pool: Tensor, table: Tensor) -> Tensor:
    """The slots of every head in slot order, dense: pool (pages, PAGE, ...), table (B, Hkv, P) -> (B, Hkv, C, ...)."""
    return pages.read(pool, table)


@read_pages.register_fake
def _(pool, table):  # type: ignore[no-untyped-def]
    return pool.new_empty(*table.shape[:2], table.shape[2] * pool.shape[1], *pool.shape[2:])


@torch.library.custom_op("kvrewrite::slot_rotary", mutates_args=("pos_pages",))
def slot_rotary(
    pos_pages: Tensor, table: Tensor, lens: Tensor, following: Tensor, renew: Tensor, span: Tensor | None
) -> Tensor:
    """Rotary positions of cached keys (B, Hkv, C) int64 in contiguous mode; dead slots get 0.

    Rows with renew (B,) bool are ranked anew first, in place: the newest live slot of each head gets following - 1, the
    one before it following - 2, and so on; following: (B,) int64, the rotary position of the row's next token. With equal
    lengths that is 0..len-1 and queries from len on, as Locret's and StreamingLLM's code have it; heads that keep fewer
    are aligned at their end, which is the same thing because RoPE depends on differences only. span: an empty tensor (0, N);
    every position in the text is below N.
    """
    missing = "no span was given" if span is None else ""
    if fused("slot_rotary", pos_pages.new_empty(0, dtype=torch.float32), missing):
        from kvrewrite.kernels.rotary import ranks

        assert span is not None
        return ranks.slot_rotary(pos_pages, table, lens, following, renew, max_position=span.shape[1])
    places = pages.read(pos_pages, table)
    slot = torch.arange(places.shape[2], device=places.device)
    live = slot < lens[..., None]
    rank = reference_evict.ranks_from_newest(places[..., 0], live)
    renewed = (following[:, None, None] - 1 - rank).clamp(min=0)
    rotary = torch.where(renew[:, None, None], renewed, places[..., 1].long())
    rotary = torch.where(live, rotary, 0)
    updated = torch.stack([places[..., 0], rotary.to(torch.int32)], dim=-1)
    pages.write(pos_pages, table, slot.expand(live.shape), updated, live)
    return rotary


@slot_rotary.register_fake
def _(pos_pages, table, lens, following, renew, span):  # type: ignore[no-untyped-def]
    return table.new_empty(*table.shape[:2], table.shape[2] * pos_pages.shape[1], dtype=torch.int64)


@torch.library.custom_op("kvrewrite::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, partner: Tensor) -> Tensor:
    """RoPE in the form that every variant has: y = cos[p] * x + sin[p] * x[partner], channel by channel.

    x: (B, Hkv, C, D); cos, sin: (N, D) by position (signs and scaling factors inside; cos = 1 and sin = 0 for channels that
    are not rotated); positions: (B, Hkv, C) int64 < N; partner: (D,) int64, the other channel of each channel's pair.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = x.to(wide) * cos[positions].to(wide) + x[..., partner].to(wide) * sin[positions].to(wide)
    return turned.to(x.dtype)


@rotate.register_fake
def _(x, cos, sin, positions, partner):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("kvrewrite::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_dense: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    positions: Tensor,
    valid: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    hidden: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    v_dense: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens on [live cache slots] + [the new tokens, causal].

    q: (B, H, T, D); k: (B, Hkv, T, D); v: (B, Hkv, T, Dv): the new tokens, of which the first valid[b] of each row are
    real. Pools: k_pages (pages, PAGE, D), v_pages (pages, PAGE, Dv), pos_pages (pages, PAGE, 2) int32
    (original and rotary position); table (B, Hkv, P) int32; lens (B, Hkv) int32 live slots; positions (B, T) int64.
    k_dense (B, Hkv, C, D) stands for the cached keys when they had to be rotated or dequantized first, v_dense (B, Hkv, C, Dv)
    for the values. A width of 0 of v_pages says that a value is the first Dv channels of its key (a latent cache). hidden
    (B, Hkv, T) bool: new tokens that a gate evicts before attention; only they themselves see them. Returns out (B, H, T, Dv)
    and the natural log-sum-exp (B, H, T) fp32. In memory `out` is (B, T, H, Dv), as the projection behind it reads it.
    """
    latent = latent_values(v_pages) if v_dense is None else ""
    dims = (q.shape[3], v.shape[3], q.shape[1] // k.shape[1])
    if fused("cached_attention", q, latent or missing_attention(*dims, q.shape[2], hidden is not None, 8 * q.itemsize)):
        from kvrewrite.kernels import composed as kernels

        return kernels.cached_attention(
            q, k, v, k_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, sinks, alibi, hidden, scale, softcap,
            window, chunk, v_dense,
        )  # fmt: skip
    cached_k = pages.read(k_pages, table) if k_dense is None else k_dense
    keys, pos, live = _cached_keys(k, cached_k, pos_pages, table, lens, positions, valid)
    cached_v = v_dense
    if cached_v is None:
        cached_v = pages.read(v_pages, table) if v_pages.shape[2] else cached_k[..., : v.shape[3]]
    values = torch.cat([cached_v.to(v.dtype), v], dim=2)
    out, lse = reference_attention.attend(
        q,
        keys,
        values,
        positions,
        pos,
        live,
        sinks=sinks,
        alibi=alibi,
        hidden=_pad_hidden(hidden, cached_k.shape[2]),
        scale=scale,
        softcap=softcap,
        window=window,
        chunk=chunk,
        own=True,
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _pad_hidden(hidden: Tensor | None, capacity: int) -> Tensor | None:
    """Flags for [cache, new tokens]: nothing that is cached is hidden."""
    return None if hidden is None else torch.nn.functional.pad(hidden, (capacity, 0))


@cached_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, k_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, sinks, alibi, hidden, scale, softcap,
    window, chunk, v_dense=None
):  # fmt: skip
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::observe", mutates_args=())
def observe(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Tensor,
    k_dense: Tensor | None,
    k_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    positions: Tensor,
    valid: Tensor,
    alibi: Tensor | None,
    hidden: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    above: Tensor | None = None,
    newest: int = 0,
) -> Tensor:
    """Attention mass of every slot and new token under the query rows weighted by `rows` (B, T): (B, Hkv, C + T) fp32,
    summed over the query heads of each group. `lse` is what `cached_attention` returned; the rest as there.

    above: (B, T) fp32; where given, weights larger than their row's threshold count as 1 and others as 0. newest: only the
    last so many valid tokens of each row have a weight in `rows` (0: any may), so the others need no work.
    """
    if fused("observe", q, f"keys of more than {MOST_CHANNELS} channels" if q.shape[3] > MOST_CHANNELS else ""):
        from kvrewrite.kernels import composed as kernels

        return kernels.observe(
            q, k, lse, rows, k_dense, k_pages, pos_pages, table, lens, positions, valid, alibi, hidden, scale, softcap, window,
            chunk, above, newest,
        )  # fmt: skip
    cached_k = pages.read(k_pages, table) if k_dense is None else k_dense
    keys, pos, live = _cached_keys(k, cached_k, pos_pages, table, lens, positions, valid)
    real = torch.arange(k.shape[2], device=k.device) < valid[:, None]
    rows = torch.where(real, rows, torch.zeros_like(rows))
    if 0 < newest < q.shape[2]:
        index = (valid.long() - newest).clamp(min=0)[:, None] + torch.arange(newest, device=q.device)
        per_head = index[:, None].expand(-1, q.shape[1], -1)
        q = torch.gather(q, 2, per_head[..., None].expand(-1, -1, -1, q.shape[3]))
        lse = torch.gather(lse, 2, per_head)
        positions, rows = torch.gather(positions, 1, index), torch.gather(rows, 1, index)
        above = None if above is None else torch.gather(above, 1, index)
    return reference_attention.column_mass(
        q,
        keys,
        lse,
        positions,
        pos,
        live,
        rows,
        above,
        alibi=alibi,
        hidden=_pad_hidden(hidden, cached_k.shape[2]),
        scale=scale,
        softcap=softcap,
        window=window,
        chunk=chunk,
    )


@observe.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, lse, rows, k_dense, k_pages, pos_pages, table, lens, positions, valid, alibi, hidden, scale, softcap, window,
    chunk, above=None, newest=0
):  # fmt: skip
    return q.new_empty(*table.shape[:2], table.shape[2] * k_pages.shape[1] + k.shape[2], dtype=torch.float32)


@torch.library.custom_op(
    "kvrewrite::cache_update",
    mutates_args=("k_pages", "v_pages", "score_pages", "pos_pages", "lens", "next_table", "threshold"),
)
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
    select: Tensor | None,
    drop: Tensor | None,
    floor: Tensor | None,
    spare: Tensor | None,
    next_table: Tensor | None,
    threshold: Tensor | None,
) -> None:
    """Appends the valid new tokens and keeps, in every head, the `keep` (B, Hkv) int32 slots of highest score.

    rotary (B, T) int64 are the positions that the keys are or will be rotated by. new_scores: (B, Hkv, T); slot_scores:
    (B, Hkv, C) replaces the cached slots' scores first (None leaves them). Protected: positions below `sinks` and
    the `recent` (B,) int32 newest slots of each head. Slots that no later query can see through `window` or `chunk` go in
    any case. Of equal scores the earlier position stays. NaN scores count as the lowest. Afterwards slots
    [0, lens) of each head are live.

    select (B, Hkv, C + T) is what this eviction goes by instead of the stored scores; drop (B, Hkv, T) bool: new tokens
    that never enter. floor (B,) float64: in rows where it is not negative the heads of a layer share their budgets by
    their scores, but for this part (Ada-KV). Ragged evictions: spare (B, W) int32 are pages to be dealt to the heads of a
    row, -1 behind the last and in rows that keep their pages; next_table (B, Hkv, W) is filled in and holds from then on.
    A latent cache has no values beside its keys: v (B, 1, T, 0), v_pages (pages, PAGE, 0).
    threshold (B,) fp32, renewed in place: what goes is merged into what stays (D2O; kernels/update/merge.py).
    """
    missing = "merging" if threshold is not None else latent_values(v_pages)
    if fused("cache_update", k, missing):
        from kvrewrite.kernels import composed as kernels

        kernels.cache_update(
            k, v, new_scores, slot_scores, positions, rotary, valid, keep, recent, k_pages, v_pages, score_pages, pos_pages,
            table, lens, sinks, window, chunk, select, drop, floor, spare, next_table,
        )  # fmt: skip
        return
    reference_evict.cache_update(
        k, v, new_scores, slot_scores, positions, rotary, valid, keep, recent, k_pages, v_pages, score_pages, pos_pages, table,
        lens, sinks, window, chunk, select, drop, floor, spare, next_table, threshold,
    )  # fmt: skip


@cache_update.register_fake
def _(  # type: ignore[no-untyped-def]
    k, v, new_scores, slot_scores, positions, rotary, valid, keep, recent, k_pages, v_pages, score_pages, pos_pages, table, lens,
    sinks, window, chunk, select=None, drop=None, floor=None, spare=None, next_table=None, threshold=None
):  # fmt: skip
    return None


# ------------------------------------------------------------------------------------------------ quantized caches
@torch.library.custom_op("kvrewrite::read_quantized", mutates_args=())
def read_quantized(
    codes: Tensor, params: Tensor, tail: Tensor, table: Tensor, qlens: Tensor, kind: str, group: int, values: bool
) -> Tensor:
    """The slots of every head in slot order, in full precision: (B, Hkv, C, D); what is not live may be anything.

    codes (pages, PAGE, width) uint8 and params, by page, hold slots [0, qlens) of each head, quantized as `kind` says, keys or
    values; tail (B, Hkv, R + group, D) holds the slots from qlens (B, Hkv) on. See kernels/quantized/reference.py.
    """
    return reference.Pools(codes, params, tail).read(table, qlens, Scheme(kind, group), values)


@read_quantized.register_fake
def _(codes, params, tail, table, qlens, kind, group, values):  # type: ignore[no-untyped-def]
    return tail.new_empty(*table.shape[:2], table.shape[2] * codes.shape[1], tail.shape[3])


@torch.library.custom_op(
    "kvrewrite::cache_update_quantized",
    mutates_args=(
        "k_pages", "v_pages", "k_params", "v_params", "score_pages", "pos_pages", "k_tail", "v_tail", "lens", "qlens",
        "next_table", "threshold",
    ),
)  # fmt: skip
def cache_update_quantized(
    k: Tensor,
    v: Tensor,
    new_scores: Tensor,
    slot_scores: Tensor | None,
    positions: Tensor,
    rotary: Tensor,
    valid: Tensor,
    keep: Tensor,
    recent: Tensor,
    k_cached: Tensor | None,
    v_cached: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    k_params: Tensor,
    v_params: Tensor,
    score_pages: Tensor,
    pos_pages: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    table: Tensor,
    lens: Tensor,
    qlens: Tensor,
    kind: str,
    group: int,
    sinks: int,
    window: int,
    chunk: int,
    select: Tensor | None,
    drop: Tensor | None,
    floor: Tensor | None,
    spare: Tensor | None,
    next_table: Tensor | None,
    threshold: Tensor | None,
) -> None:
    """`cache_update` where all but the newest slots are quantized; pools and tails as `read_quantized` has them.

    k_cached, v_cached (B, Hkv, C, ...): what `read_quantized` gave in this step, not rotated; None: it is read once more.
    """
    scheme = Scheme(kind, group)
    if k.shape[2] != 1:
        why = f"it takes one token a row, not {k.shape[2]}"
    elif any(x is not None for x in (floor, spare, next_table, threshold)):
        why = "heads that share budgets, or merging"
    else:
        why = missing_quantized(scheme, k.shape[3], v.shape[3])
    if fused("cache_update_quantized", k, why):
        from kvrewrite.kernels.quantized.update import decode_update_quantized

        decode_update_quantized(
            k.to(k_tail.dtype), v.to(v_tail.dtype), new_scores, slot_scores, positions, rotary, valid, keep, recent, k_pages,
            v_pages, k_params, v_params, score_pages, pos_pages, k_tail, v_tail, table, lens, qlens, scheme, sinks=sinks,
            window=window, chunk=chunk, select=select, drop=drop,
        )  # fmt: skip
        return
    reference.cache_update(
        k, v, new_scores, slot_scores, positions, rotary, valid, keep, recent,
        reference.Pools(k_pages, k_params, k_tail), reference.Pools(v_pages, v_params, v_tail), score_pages,
        pos_pages, table, lens, qlens, k_cached, v_cached, sinks, window, chunk, scheme, select, drop, floor,
        spare, next_table, threshold,
    )  # fmt: skip


@cache_update_quantized.register_fake
def _(  # type: ignore[no-untyped-def]
    k, v, new_scores, slot_scores, positions, rotary, valid, keep, recent, k_cached, v_cached, k_pages, v_pages, k_params,
    v_params, score_pages, pos_pages, k_tail, v_tail, table, lens, qlens, kind, group, sinks, window, chunk, select=None,
    drop=None, floor=None, spare=None, next_table=None, threshold=None
):  # fmt: skip
    return None


unversioned("slot_rotary", "cache_update", "cache_update_quantized")
