"""Operators that lowering puts in the place of several others (passes/lower/decode.py). Shapes as in ops.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvrewrite.kernels import pages
from kvrewrite.kernels.limits import missing_attention
from kvrewrite.kernels.quantized.scheme import Scheme
from kvrewrite.kernels.quantized.split import missing
from kvrewrite.kernels.rotary.reference import settle
from kvrewrite.ops.dispatch import fused, latent_values
from kvrewrite.ops.linear import ACTIVATIONS
from kvrewrite.ops.unversioned import unversioned


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
    """`rotate(read_pages(k_pages, table), ...)` in one go: (B, Hkv, C, D). Dead slots may hold anything (kernel: zeros).

    half: h where the partners of channels 0..h-1 are h..2h-1 and no other channel is rotated, which is faster; else 0.
    """
    if fused("read_rotated", k_pages):
        from kvrewrite.kernels.rotary.gather import gather

        k_dense, _ = gather(k_pages, None, table, lens, rotary=positions, cos=cos, sin=sin, partner=partner, half=half)
        assert k_dense is not None
        return k_dense
    return torch.ops.kvrewrite.rotate(pages.read(k_pages, table), cos, sin, positions, partner)


@read_rotated.register_fake
def _(k_pages, table, lens, cos, sin, positions, partner, half):  # type: ignore[no-untyped-def]
    return k_pages.new_empty(*table.shape[:2], table.shape[2] * k_pages.shape[1], k_pages.shape[2])


@torch.library.custom_op("kvrewrite::slot_rotary_layers", mutates_args=("pos_pages",))
def slot_rotary_layers(
    pos_pages: Tensor, tables: Tensor, lens: Tensor, layers: int, following: Tensor, renew: Tensor, span: Tensor | None
) -> Tensor:
    """`slot_rotary` of all layers that share a pool: tables (layers, B, Hkv, P), lens (layers, B, Hkv) -> (layers, B, Hkv, C)."""
    flat = (tables.flatten(0, 1), lens.reshape(-1, lens.shape[2]), following.repeat(layers), renew.repeat(layers))
    # Lengths lie layer by layer in no order of their dims, which elementwise ops would hand on.
    return torch.ops.kvrewrite.slot_rotary(pos_pages, *flat, span).unflatten(0, (layers, -1)).contiguous()


@slot_rotary_layers.register_fake
def _(pos_pages, tables, lens, layers, following, renew, span):  # type: ignore[no-untyped-def]
    return tables.new_empty(*tables.shape[:3], tables.shape[3] * pos_pages.shape[1], dtype=torch.int64)


def turn(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """RoPE of tokens x (B, H, T, D) whose channels' partners are half a head away; cos, sin: (B, T, D), or None: x itself."""
    if cos is None or sin is None:
        return x
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-high, low], -1) * sin.unsqueeze(1)


@torch.library.custom_op("kvrewrite::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_dense: Tensor | None,
    v_dense: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    positions: Tensor,
    valid: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    mass: bool,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    early: bool = False,
    following: Tensor | None = None,
    key_cos: Tensor | None = None,
    key_sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` of one new token a row (T = 1), with the attention mass of every slot from the same pass.

    Returns out (B, H, 1, Dv), the log-sum-exp (B, H, 1) fp32, and with `mass` what `observe` gives for a weight of 1:
    (B, Hkv, C + 1) fp32; without it that is empty. cos, sin: (B, 1, D): q and k come unrotated, and are rotated by `turn` first.
    early: what is launched just before writes none of pools, table, lens and valid; kernels then read them while it still runs.

    following (B,) int64, key_cos and key_sin (N, D): cached keys come unrotated. A slot of rank r from the newest (0) has the
    second position `positions - 1 - r` in pos_pages, as `token_update` keeps it, and its key is rotated by following - 1 - r; y =
    cos * x + sin * x[partner] of channels whose partners are half a head away.
    """
    rest = (table, lens, positions, valid)
    dims = (q.shape[3], v.shape[3], q.shape[1] // k.shape[1])
    if fused("decode_attention", q, latent_values(v_pages) or missing_attention(*dims, 1, False)):
        from kvrewrite.kernels.attention.decode import decode_attention as kernel

        out, lse, found = kernel(
            q, k, v, k_dense, v_dense, k_pages, v_pages, pos_pages, *rest, sinks, alibi, scale=scale, softcap=softcap,
            window=window, chunk=chunk, mass=mass, cos=cos, sin=sin, early=early, following=following,
            key_cos=None if key_cos is None else key_cos.contiguous(),
            key_sin=None if key_sin is None else key_sin.contiguous(),
        )  # fmt: skip
        return out, lse, lse.new_empty(0) if found is None else found
    q, k = turn(q, cos, sin), turn(k, cos, sin)
    if following is not None:
        live = torch.arange(table.shape[2] * k_pages.shape[1], device=q.device) < lens[..., None]
        back = positions[:, :, None] - pages.read(pos_pages, table)[..., 1]
        at = torch.where(live, (following[:, None, None] - back).clamp(min=0), 0)
        partner = torch.arange(q.shape[3], device=q.device).roll(q.shape[3] // 2)
        k_dense = torch.ops.kvrewrite.rotate(pages.read(k_pages, table), key_cos, key_sin, at, partner)
    out, lse = torch.ops.kvrewrite.cached_attention(
        q, k, v, k_dense, k_pages, v_pages, pos_pages, *rest, sinks, alibi, None, scale, softcap, window, chunk, v_dense
    )
    if not mass:
        return out, lse, lse.new_empty(0)
    rows = torch.ones(q.shape[0], 1, device=q.device)
    found = torch.ops.kvrewrite.observe(
        q, k, lse, rows, k_dense, k_pages, pos_pages, *rest, alibi, None, scale, softcap, window, chunk
    )
    return out, lse, found


@decode_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, k_dense, v_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, sinks, alibi, scale, softcap, window,
    chunk, mass, cos=None, sin=None, early=False, following=None, key_cos=None, key_sin=None
):  # fmt: skip
    out = q.new_empty(q.shape[0], q.shape[1], 1, v.shape[3])
    width = (*table.shape[:2], table.shape[2] * k_pages.shape[1] + 1)
    found = q.new_empty(width if mass else (0,), dtype=torch.float32)
    return out, q.new_empty(q.shape[0], q.shape[1], 1, dtype=torch.float32), found


@torch.library.custom_op("kvrewrite::decode_attention_quantized", mutates_args=())
def decode_attention_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_params: Tensor,
    v_params: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    qlens: Tensor,
    positions: Tensor,
    valid: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    kind: str,
    group: int,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_attention` on a quantized cache (pools, parameters, tails and qlens as `read_quantized` has them), whose keys and
    values the kernel reads as they are stored. Returns the same."""
    scheme = Scheme(kind, group)
    dims = (q.shape[3], v.shape[3], q.shape[1] // k.shape[1])
    if fused("decode_attention_quantized", q, missing(scheme, *dims)):
        from kvrewrite.kernels.quantized.decode import decode_attention_quantized as kernel

        out, lse, found = kernel(
            q, k, v, k_pages, v_pages, k_params, v_params, k_tail, v_tail, pos_pages, table, lens, qlens, positions, valid,
            sinks, alibi, scheme, scale=scale, softcap=softcap, window=window, chunk=chunk, mass=mass,
        )  # fmt: skip
        return out, lse, lse.new_empty(0) if found is None else found
    read = (table, qlens, kind, group)
    k_dense = torch.ops.kvrewrite.read_quantized(k_pages, k_params, k_tail, *read, False)
    v_dense = torch.ops.kvrewrite.read_quantized(v_pages, v_params, v_tail, *read, True)
    return torch.ops.kvrewrite.decode_attention(
        q, k, v, k_dense, v_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, sinks, alibi, scale, softcap,
        window, chunk, mass,
    )  # fmt: skip


@decode_attention_quantized.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, k_params, v_params, k_tail, v_tail, pos_pages, table, lens, qlens, positions, valid, sinks,
    alibi, kind, group, scale, softcap, window, chunk, mass
):  # fmt: skip
    out = q.new_empty(q.shape[0], q.shape[1], 1, v.shape[3])
    width = (*table.shape[:2], table.shape[2] * k_pages.shape[1] + 1)
    found = q.new_empty(width if mass else (0,), dtype=torch.float32)
    return out, q.new_empty(q.shape[0], q.shape[1], 1, dtype=torch.float32), found


@torch.library.custom_op(
    "kvrewrite::token_update", mutates_args=("k_pages", "v_pages", "score_pages", "pos_pages", "lens")
)
def token_update(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
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
    head: Tensor | None,
    activation: str,
    cos: Tensor | None,
    sin: Tensor | None,
    ranks: bool = False,
) -> None:
    """`cache_update` of one new token a row (T = 1), of heads that neither share budgets nor merge, and what stands before it.

    head: (Hkv, W), contiguous: then scores (B, 1, W) is the hidden layer of a retaining head, whose scores are
    act(scores) head^T; activation: one of linear_ops.ACTIVATIONS. cos, sin: (B, 1, D): then k comes unrotated and is cached
    rotated by `turn`.

    ranks: the second position of a slot says how many live slots of its head are newer: it is that of the newest token of the
    text, `positions`, minus their number. Newcomers come with rotary = positions. When a slot goes, those that are older come one
    nearer, and all do when a newcomer does not enter.
    """
    pools = (k_pages, v_pages, score_pages, pos_pages, table, lens)
    rows = (positions, rotary, valid, keep, recent)
    if fused("token_update", k, latent_values(v_pages)):
        from kvrewrite.kernels.update.decode import decode_update

        decode_update(
            k.to(k_pages.dtype), v.to(v_pages.dtype), scores, slot_scores, *rows, *pools, sinks=sinks, window=window,
            chunk=chunk, select=select, drop=drop, head=head, activation=activation, cos=cos, sin=sin, ranks=ranks,
        )  # fmt: skip
        return
    if head is not None:
        scores = linear(ACTIVATIONS[activation](scores), head).transpose(1, 2).to(torch.float32)
    rest = (sinks, window, chunk, select, drop, None, None, None, None)
    torch.ops.kvrewrite.cache_update(turn(k, cos, sin), v, scores, slot_scores, *rows, *pools, *rest)
    if ranks:
        # Made anew for all slots: a head's newest one has the position of the newest token.
        torch.ops.kvrewrite.slot_rotary(pos_pages, table, lens, positions[:, 0] + 1, valid > 0, None)


@token_update.register_fake
def _(  # type: ignore[no-untyped-def]
    k, v, scores, slot_scores, positions, rotary, valid, keep, recent, k_pages, v_pages, score_pages, pos_pages, table, lens,
    sinks, window, chunk, select, drop, head, activation, cos, sin, ranks=False
):  # fmt: skip
    return None


@torch.library.custom_op(
    "kvrewrite::attend_and_update", mutates_args=("k_pages", "v_pages", "score_pages", "pos_pages", "lens")
)
def attend_and_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_dense: Tensor | None,
    v_dense: Tensor | None,
    attention_sinks: Tensor | None,
    alibi: Tensor | None,
    hidden: Tensor | None,
    scale: float,
    softcap: float,
    visible_window: int,
    visible_chunk: int,
    new_k: Tensor,
    new_v: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """`cached_attention` of the first twelve arguments, and then `cache_update` of the others, for heads that neither share
    budgets nor merge, and an update that needs nothing of the attention. On a GPU both run at the same time.

    visible_window, visible_chunk and window, chunk: as the two ops have them under the same name.
    """
    attended = (
        q,
        k,
        v,
        k_dense,
        k_pages,
        v_pages,
        pos_pages,
        table,
        lens,
        positions,
        valid,
        attention_sinks,
        alibi,
        hidden,
    )
    shape = (scale, softcap, visible_window, visible_chunk)
    added = (new_k, new_v, new_scores, slot_scores, positions, rotary, valid, keep, recent)
    pools = (k_pages, v_pages, score_pages, pos_pages, table, lens)
    rest = (sinks, window, chunk, select, drop, None, None, None)
    dims = (q.shape[3], v.shape[3], q.shape[1] // k.shape[1])
    if fused("attend_and_update", q, missing_attention(*dims, q.shape[2], hidden is not None, 8 * q.itemsize)):
        from kvrewrite.kernels import composed as kernels

        return kernels.attend_and_update((*attended, *shape, v_dense), (*added, *pools, *rest))
    result = torch.ops.kvrewrite.cached_attention(*attended, *shape, v_dense)
    torch.ops.kvrewrite.cache_update(*added, *pools, *rest, None)
    return result


@attend_and_update.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, k_dense, v_dense, attention_sinks, alibi, hidden, scale, softcap, visible_window, visible_chunk, new_k, new_v,
    new_scores, slot_scores, positions, rotary, valid, keep, recent, k_pages, v_pages, score_pages, pos_pages, table, lens,
    sinks, window, chunk, select, drop
):  # fmt: skip
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::turn_both", mutates_args=())
def turn_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`turn` of queries (B, H, T, D) and keys (B, Hkv, T, D) of any number of tokens; cos, sin: (B or 1, T, D). In memory both
    results are (B, T, heads, D)."""
    if fused("turn_both", q):
        from kvrewrite.kernels.rotary.rope import turn_both as kernel

        return kernel(q, k, cos, sin)
    turned_q, turned_k = [turn(x, cos, sin).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    return turned_q, turned_k


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

    Contiguous positions: once ranks are frozen, keys can lie rotated, so that decoding reads them as they are. cos, sin:
    (N, D) by position; N reaches beyond every stored position.
    """
    if fused("settle_keys", k_pages):
        from kvrewrite.kernels.rotary import rotate_cached_keys as kernel

        kernel.settle(k_pages, pos_pages, table, lens, cos.contiguous(), sin.contiguous(), partner, undo)
        return
    settle(k_pages, pos_pages, table, lens, cos, sin, partner, undo)


@settle_keys.register_fake
def _(k_pages, pos_pages, table, lens, cos, sin, partner, undo):  # type: ignore[no-untyped-def]
    return None


unversioned("slot_rotary_layers", "token_update", "attend_and_update", "settle_keys")
