"""The operators that policies score with: schemas, fakes and the dispatch to their implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import At, Dense, Forecast, Logits, Repetition, Rotation, Tokens
from kvrewrite.kernels.scores import compactor, critical, lag, r_kv, reference
from kvrewrite.kernels.scores import reconstruction as repeating
from kvrewrite.kernels.update import reference as reference_evict
from kvrewrite.ops.dispatch import unversioned
from kvrewrite.ops.groups import Fields, define


@torch.library.custom_op("kvrewrite::slot_positions", mutates_args=())
def slot_positions(pos_pages: Tensor, table: Tensor, lens: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """Positions in the text of [cached slots, new tokens], -1 where there is none: (B, Hkv, C + T) int64."""
    cached = pages.read(pos_pages, table)[..., 0].long()
    live = torch.arange(cached.shape[2], device=cached.device) < lens[..., None]
    real = torch.arange(positions.shape[1], device=positions.device) < valid[:, None]
    new = torch.where(real, positions, -1)[:, None].expand(-1, table.shape[1], -1)
    return torch.cat([torch.where(live, cached, -1), new], dim=2)


@slot_positions.register_fake
def _(pos_pages, table, lens, positions, valid):  # type: ignore[no-untyped-def]
    size = table.shape[2] * pos_pages.shape[1] + positions.shape[1]
    return positions.new_empty(*table.shape[:2], size, dtype=torch.int64)


@torch.library.custom_op("kvrewrite::newest_rows", mutates_args=())
def newest_rows(positions: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Weights of query rows (B, T) fp32: 1 for the last `count` (B,) of each row's `valid` (B,) tokens, else 0."""
    index = torch.arange(positions.shape[1], device=positions.device)
    return ((index < valid[:, None]) & (index >= (valid - count)[:, None])).to(torch.float32)


@newest_rows.register_fake
def _(positions, valid, count):  # type: ignore[no-untyped-def]
    return torch.empty_like(positions, dtype=torch.float32)


@torch.library.custom_op("kvrewrite::newest_ranks", mutates_args=())
def newest_ranks(positions: Tensor) -> Tensor:
    """How many slots of its head are newer than each: positions (B, Hkv, N), -1 for none, which get a large number."""
    return reference_evict.ranks_from_newest(positions, positions >= 0)


@newest_ranks.register_fake
def _(positions):  # type: ignore[no-untyped-def]
    return torch.empty_like(positions)


@torch.library.custom_op("kvrewrite::uniform", mutates_args=())
def uniform(positions: Tensor, seed: int, layer: int, first_head: int = 0) -> Tensor:
    """A number in (0, 1) for each (seed, layer, head, position), fp32; positions: (B, Hkv, N). first_head: the number of
    the first of these heads, where others are elsewhere."""
    return reference.uniform(positions, seed, layer, first_head)


@uniform.register_fake
def _(positions, seed, layer, first_head=0):  # type: ignore[no-untyped-def]
    return torch.empty_like(positions, dtype=torch.float32)


@torch.library.custom_op("kvrewrite::ranks", mutates_args=())
def ranks(scores: Tensor, among: Tensor) -> Tensor:
    """The place of each slot by its score `among` (bool) the slots of its head, 0 for the largest; others get N."""
    return reference.ranks(scores, among)


@ranks.register_fake
def _(scores, among):  # type: ignore[no-untyped-def]
    return torch.empty_like(scores, dtype=torch.int64)


@torch.library.custom_op("kvrewrite::pool_window", mutates_args=())
def pool_window(mass: Tensor, valid: Tensor, window: int, kernel: int, largest: bool) -> Tensor:
    """Pools (B, Hkv, T) over neighbours among the tokens before each row's last `window` valid ones."""
    return reference.pool_window(mass, valid, window, kernel, largest)


@pool_window.register_fake
def _(mass, valid, window, kernel, largest):  # type: ignore[no-untyped-def]
    return torch.empty_like(mass)


@torch.library.custom_op("kvrewrite::key_difference", mutates_args=())
def key_difference(keys: Tensor, positions: Tensor) -> Tensor:
    """KeyDiff's score of keys (B, Hkv, N, D) whose positions (B, Hkv, N) are not -1: (B, Hkv, N) fp32."""
    return reference.key_difference(keys, positions >= 0)


@key_difference.register_fake
def _(keys, positions):  # type: ignore[no-untyped-def]
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)


expected_attention_op = define("expected_attention", Tokens, Rotation, "Tensor valid", Forecast, returns="Tensor")


@expected_attention_op
def expected_attention(tokens: Tokens, rotation: Rotation, valid: Tensor, forecast: Forecast) -> Tensor:
    """Expected attention of the new tokens' keys: (B, Hkv, T) fp32. See kernels/scores/reference.py."""
    return reference.expected_attention(tokens, rotation, valid, forecast)


@expected_attention_op.fake
def _(tokens: Tokens, rotation: Rotation, valid: Tensor, forecast: Forecast) -> Tensor:
    return tokens.k.new_empty(tokens.k.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::lag_scores", mutates_args=())
def lag_scores(k: Tensor, v: Tensor, valid: Tensor, sinks: int, lag_size: int, across: bool) -> Tensor:
    """LagKV's scores of the new tokens: (B, Hkv, T) fp32. See kernels/scores/lag.py."""
    return lag.lag_scores(k, v, valid, sinks, lag_size, across)


@lag_scores.register_fake
def _(k, v, valid, sinks, lag_size, across):  # type: ignore[no-untyped-def]
    return k.new_empty(k.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::leverage", mutates_args=())
def leverage(keys: Tensor, sketch: Tensor, valid: Tensor, first: int, last: int) -> Tensor:
    """Leverage scores of the new tokens' sketched keys: (B, Hkv, T) fp32. See kernels/scores/compactor.py."""
    return compactor.leverage(keys, sketch, valid, first, last)


@leverage.register_fake
def _(keys, sketch, valid, first, last):  # type: ignore[no-untyped-def]
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::block_column_mass", mutates_args=())
def block_column_mass(q: Tensor, k: Tensor, valid: Tensor, block: int, first: int, last: int) -> Tensor:
    """Attention that the new tokens receive within their block, from both sides: (B, Hkv, T) fp32. See
    kernels/scores/compactor.py."""
    return compactor.block_column_mass(q, k, valid, block, first, last)


@block_column_mass.register_fake
def _(q, k, valid, block, first, last):  # type: ignore[no-untyped-def]
    return k.new_empty(k.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::projected_norm", mutates_args=())
def projected_norm(v: Tensor, weight: Tensor) -> Tensor:
    """The L1 norm of values after the output projection: (B, Hkv, T) fp32. See kernels/scores/critical.py."""
    return critical.projected_norm(v, weight)


@projected_norm.register_fake
def _(v, weight):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::surprisal", mutates_args=("last",))
def surprisal(logits: Tensor, ids: Tensor, valid: Tensor, last: Tensor, positions: Tensor) -> Tensor:
    """Minus the log probability of each new token (B, T) fp32; last (B, V) fp32: the logits before the first,
    renewed."""
    return reference.surprisal(logits, ids, valid, last, positions[:, 0] > 0)


@surprisal.register_fake
def _(logits, ids, valid, last, positions):  # type: ignore[no-untyped-def]
    return torch.empty_like(ids, dtype=torch.float32)


@torch.library.custom_op("kvrewrite::gate", mutates_args=("k_state", "v_state"))
def gate(
    q: Tensor, k: Tensor, v: Tensor, k_state: Tensor, v_state: Tensor, positions: Tensor, valid: Tensor, heads: int
) -> Tensor:
    """An Attention-Gate's own causal attention over all tokens so far, (B, T, heads * d) fp32; appends k and v to its
    state (B, capacity, heads * d) at positions (B, T)."""
    return reference.gate(q, k, v, k_state, v_state, positions[:, 0], valid, heads)


@gate.register_fake
def _(q, k, v, k_state, v_state, positions, valid, heads):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("kvrewrite::sink_gate", mutates_args=())
def sink_gate(q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, k_base: Tensor, bias: Tensor) -> Tensor:
    """Fast KVzip's scores (B, Hkv, T) fp32 of tokens whose gates project to q and k. See
    kernels/scores/reference.py."""
    return reference.sink_gate(q, k, q_norm, k_norm, k_base, bias)


@sink_gate.register_fake
def _(q, k, q_norm, k_norm, k_base, bias):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], bias.shape[0], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("kvrewrite::kept_above", mutates_args=())
def kept_above(
    scores: Tensor,
    places: Tensor,
    recent: Tensor,
    keep: Tensor,
    evicts: Tensor,
    threshold: float,
    window: int,
    chunk: int,
) -> Tensor:
    """How many slots of each head stay (B, Hkv) int32: those that score `threshold` or more and the `recent` (B,)
    newest, at most `keep` (B, Hkv) int32.

    scores, places (B, Hkv, N): of all slots, places as `slot_positions` gives them. Slots that no later query sees
    through `window` or `chunk` do not count. Rows whose `evicts` (B,) is 0 lose nothing.
    """
    return reference.kept_above(scores, places, recent, keep, evicts, threshold, window, chunk)


@kept_above.register_fake
def _(scores, places, recent, keep, evicts, threshold, window, chunk):  # type: ignore[no-untyped-def]
    return torch.empty_like(keep)


@torch.library.custom_op("kvrewrite::share_layers", mutates_args=())
def share_layers(
    scores: list[Tensor], places: list[Tensor], keep: list[Tensor], recent: Tensor, sinks: int
) -> list[Tensor]:
    """How many slots each head of each layer keeps, (B, Hkv) int32 per layer, where all heads of all layers share one
    budget.

    scores, places: a (B, Hkv, N) of each layer, all its slots; keep: a (B, Hkv) int32 of each layer, whose sum is what
    a row keeps. Positions below `sinks` and the `recent` (B,) newest slots of each head count as best; of equal scores
    those of the lower layer and head stay. A device is asked once whether anything goes.
    """
    return reference.share_layers(scores, places, keep, recent, sinks)


@share_layers.register_fake
def _(scores, places, keep, recent, sinks):  # type: ignore[no-untyped-def]
    return [torch.empty_like(k) for k in keep]


def in_spans(places: Tensor, begins: list[Tensor], ends: list[Tensor]) -> Tensor:
    """Which places (B, ..., N) lie in one of their row's spans [begin, end), each a (B,) of `begins` and `ends`."""
    found = torch.zeros_like(places, dtype=torch.bool)
    shape = (-1, *(1,) * (places.dim() - 1))
    for begin, end in zip(begins, ends):
        found |= (places >= begin.view(shape)) & (places < end.view(shape))
    return found


@torch.library.custom_op("kvrewrite::pin_scores", mutates_args=())
def pin_scores(scores: Tensor, places: Tensor, begins: list[Tensor], ends: list[Tensor]) -> Tensor:
    """Scores (B, Hkv, N) fp32 with infinity for slots whose position, places (B, Hkv, N), is pinned: lies in a span of its
    row, whose begins and ends are (B,) int32 each."""
    return scores.masked_fill(in_spans(places, begins, ends), float("inf"))


@pin_scores.register_fake
def _(scores, places, begins, ends):  # type: ignore[no-untyped-def]
    return torch.empty_like(scores)


@torch.library.custom_op("kvrewrite::unhide_pinned", mutates_args=())
def unhide_pinned(hidden: Tensor, positions: Tensor, begins: list[Tensor], ends: list[Tensor]) -> Tensor:
    """A gate's flags (B, Hkv, T) bool without those of new tokens, at positions (B, T), that are pinned."""
    return hidden & ~in_spans(positions, begins, ends)[:, None]


@unhide_pinned.register_fake
def _(hidden, positions, begins, ends):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden)


reconstruction_op = define(
    "reconstruction",
    Fields(Repetition, "q k stored begins ends"),
    Fields(Dense, "k_dense"),
    "Tensor k_pages",
    "Tensor table",
    At,
    Fields(Logits, "sinks alibi scale softcap"),
    Fields(Repetition, "first most"),
    returns="Tensor",
)


@reconstruction_op
def reconstruction(
    repetition: Repetition, dense: Dense, k_pages: Tensor, table: Tensor, at: At, logits: Logits
) -> Tensor:
    """Scores of cached slots (B, Hkv, C) fp32: those of the part that a row repeats are the largest softmax weight that
    any token of the repetition, in any head of the group, gives to the slot; others keep `stored`.

    The softmax is that of the repetition's tokens, causal, over the `first` slots, the part and the tokens themselves
    (KVzip, arXiv 2505.23416, section 3.4).
    """
    return repeating.reconstruction(repetition, dense, k_pages, table, at, logits)


@reconstruction_op.fake
def _(repetition: Repetition, dense: Dense, k_pages: Tensor, table: Tensor, at: At, logits: Logits) -> Tensor:
    return torch.empty_like(repetition.stored)


@torch.library.custom_op("kvrewrite::recent_queries", mutates_args=("state",))
def recent_queries(q: Tensor, state: Tensor, valid: Tensor) -> Tensor:
    """The last W queries of each row (B, H, W, D); renews the state that holds them. See kernels/scores/r_kv.py."""
    return r_kv.recent_queries(q, state, valid)


@recent_queries.register_fake
def _(q, state, valid):  # type: ignore[no-untyped-def]
    return torch.empty_like(state)


@torch.library.custom_op("kvrewrite::joint_scores", mutates_args=())
def joint_scores(
    queries: Tensor, keys: Tensor, places: Tensor, scale: float, kernel: int, share: float, evicts: Tensor
) -> Tensor:
    """R-KV's scores of all slots: (B, Hkv, N) fp32. See kernels/scores/r_kv.py."""
    return r_kv.joint_scores(queries, keys, places, scale, kernel, share, evicts)


@joint_scores.register_fake
def _(queries, keys, places, scale, kernel, share, evicts):  # type: ignore[no-untyped-def]
    return places.new_empty(places.shape, dtype=torch.float32)


unversioned("kvrewrite::surprisal", "kvrewrite::gate", "kvrewrite::recent_queries")
