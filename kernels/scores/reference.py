"""What policies score slots by, in plain torch: random numbers by position, ranks, pooling, similarity, expected
attention.

Shapes: B rows, Hkv kv heads, N slots and new tokens of a head, T new tokens. Dead slots may hold anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.groups import Forecast, Rotation, Tokens
from kvrewrite.kernels.update.reference import ranks_from_newest, visible_later

M1, M2, M3, M4 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93


def _signed(x: int) -> int:
    """A 64-bit word as the signed integer with the same bits."""
    x %= 1 << 64
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(positions: Tensor, seed: int, layer: int, first_head: int = 0) -> Tensor:
    """A number in (0, 1) for each (seed, layer, head, position), the same on every device and in any batch.

    positions: (B, Hkv, N) int64. Returns fp32 with 24 random bits (the finalizer of SplitMix64, Steele et al., OOPSLA
    2014, over a weighted sum of the four).
    """
    head = torch.arange(first_head, first_head + positions.shape[1], device=positions.device)[:, None]
    start = _signed(seed * M1 + layer * M2)
    z = (positions + 1) * _signed(M4) + head * _signed(M3) + start
    z = (z ^ _shift(z, 30)) * _signed(M2)
    z = (z ^ _shift(z, 27)) * _signed(M3)
    z = z ^ _shift(z, 31)
    # In fp32 the largest would round to 1.
    return ((_shift(z, 40).to(torch.float32) + 0.5) / (1 << 24)).clamp(max=1 - 2**-24)


def ranks(scores: Tensor, among: Tensor) -> Tensor:
    """The place (0 is the largest score) of each slot of a head `among` (bool) the others; N for those not among them.
    Of equal scores the earlier index comes first."""
    order = torch.argsort(scores.masked_fill(~among, float("-inf")), dim=-1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))
    return torch.where(among, place, scores.shape[-1])


def pool_window(mass: Tensor, valid: Tensor, window: int, kernel: int, largest: bool) -> Tensor:
    """SnapKV's pooling over neighbours (arXiv 2404.14469, section 4.2): stride 1, same length, zeros beyond the ends.

    mass: (B, Hkv, T) attention received; only the tokens before the last `window` of each row's valid (B,) ones take
    part. largest: maximum instead of the mean (of `kernel` numbers, whatever lies beyond the ends). Others give 0.
    """
    before = (torch.arange(mass.shape[-1], device=mass.device) < (valid - window)[:, None])[:, None]
    inside = torch.where(before, mass, 0.0)
    pool = torch.nn.functional.max_pool1d if largest else torch.nn.functional.avg_pool1d
    return torch.where(before, pool(inside, kernel, stride=1, padding=kernel // 2), 0.0)


def key_difference(keys: Tensor, live: Tensor) -> Tensor:
    """KeyDiff's score (arXiv 2504.15364, section 3): minus the cosine between a key and the mean direction of all keys.

    keys: (B, Hkv, N, D); live: (B, Hkv, N). Returns (B, Hkv, N) fp32, 0 for dead slots.
    """
    unit = torch.nn.functional.normalize(torch.where(live[..., None], keys.float(), 0.0), dim=-1)
    anchor = unit.sum(2, keepdim=True) / live.sum(2)[..., None, None].clamp(min=1)
    return -torch.nn.functional.cosine_similarity(unit, anchor, dim=-1)


def expected_attention(tokens: Tokens, rotation: Rotation, valid: Tensor, forecast: Forecast) -> Tensor:
    """Expected attention (arXiv 2510.00636, section 3): what Gaussian future queries will give to a key, times its
    value's norm.

    q: (B, H, T, D) before the rotation; k: (B, Hkv, T, D) rotated; v: (B, Hkv, T, Dv); cos, sin: (P, D) of the rotation
    y = cos * x + sin * x[partner], None without one; valid: (B,). The queries' mean and covariance are those of the
    tokens from `sinks` on, rotated by the mean rotation of the `future` positions after the row. Returns (B, Hkv, T)
    fp32.
    """
    (q, k, v), (cos, sin, partner) = tokens, rotation
    scale, sinks, future, epsilon = forecast
    b, h, t, d = q.shape
    hkv = k.shape[1]
    index = torch.arange(t, device=q.device)
    real = ((index < valid[:, None]) & (index >= sinks))[:, None]  # (B, 1, T)
    count = real.sum(-1, keepdim=True).clamp(min=1)[..., None]
    wide = torch.where(real[..., None], q.float(), 0.0)
    mean = wide.sum(2, keepdim=True) / count  # (B, H, 1, D)
    centred = torch.where(real[..., None], wide - mean, 0.0)
    covariance = centred.transpose(2, 3) @ centred / count  # (B, H, D, D)
    mean = mean[:, :, 0]
    if cos is not None and sin is not None and partner is not None:
        # A model with a table of positions has none beyond its end.
        ahead = (valid.long()[:, None] + torch.arange(future, device=q.device)).clamp(max=cos.shape[0] - 1)
        turn = torch.diag_embed(cos.float()[ahead].mean(1))  # (B, D, D)
        turn[:, torch.arange(d, device=q.device), partner] += sin.float()[ahead].mean(1)
        mean = torch.einsum("bij,bhj->bhi", turn, mean)
        covariance = turn[:, None] @ covariance @ turn[:, None].transpose(2, 3)
    keys = torch.where(real[..., None], k.float(), 0.0)
    grouped, spread = mean.reshape(b, hkv, h // hkv, d), covariance.reshape(b, hkv, h // hkv, d, d)
    logits = torch.einsum("bhtd,bhgd->bhgt", keys, grouped) * scale
    logits += torch.einsum("bhti,bhgij,bhtj->bhgt", keys, spread, keys) * (scale * scale / 2)
    weights = torch.softmax(logits.masked_fill(~real[:, :, None], float("-inf")), dim=-1).nan_to_num(0.0).mean(2)
    return (weights + epsilon) * torch.where(real[..., None], v.float(), 0.0).norm(dim=-1)


def surprisal(logits: Tensor, ids: Tensor, valid: Tensor, last: Tensor, started: Tensor) -> Tensor:
    """Minus the log probability of each new token, by the logits before it (SirLLM, arXiv 2405.12528, section 3).

    logits: (B, T, V); ids: (B, T); last: (B, V) fp32, the logits before the first token, replaced in place by those of
    each row's last valid token; started: (B,) bool, whether there are any: a row's first token gets the largest fp32.
    Returns (B, T) fp32.
    """
    ahead = torch.cat([last[:, None].to(torch.float32), logits[:, :-1].float()], dim=1)
    lost = torch.logsumexp(ahead, dim=-1) - torch.gather(ahead, 2, ids.long()[..., None])[..., 0]
    lost[:, 0] = torch.where(started, lost[:, 0], torch.finfo(torch.float32).max)
    at = (valid.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, logits.shape[-1])
    newest = torch.gather(logits, 1, at)[:, 0].float()
    last.copy_(torch.where((valid > 0)[:, None], newest, last))
    return lost


def gate(
    q: Tensor, k: Tensor, v: Tensor, k_state: Tensor, v_state: Tensor, seen: Tensor, valid: Tensor, heads: int
) -> Tensor:
    """The small causal attention of an Attention-Gate over all tokens of a row, kept or not.

    q, k, v: (B, T, heads * d); k_state, v_state: (B, capacity, heads * d), of which the first seen (B,) tokens count;
    the valid (B,) new ones are written after them in place. Returns (B, T, heads * d) fp32.
    """
    b, t, width = q.shape
    d = width // heads
    index = torch.arange(t, device=q.device)
    real = index < valid[:, None]
    # Padding goes to the place of a row's last real token, with that token's content.
    source = torch.minimum(index.expand(b, t), (valid.long() - 1).clamp(min=0)[:, None])
    place = (seen.long()[:, None] + source).clamp(max=k_state.shape[1] - 1)
    for state, new in ((k_state, k), (v_state, v)):
        held = torch.gather(state, 1, place[..., None].expand(b, t, width))
        shifted = torch.gather(new, 1, source[..., None].expand(b, t, width)).to(state.dtype)
        state.scatter_(1, place[..., None].expand(b, t, width), torch.where((valid > 0)[:, None, None], shifted, held))
    column = torch.arange(k_state.shape[1], device=q.device)
    keys = torch.where((column < (seen + valid)[:, None])[..., None], k_state.float(), 0.0).reshape(b, -1, heads, d)
    values = torch.where((column < (seen + valid)[:, None])[..., None], v_state.float(), 0.0).reshape(b, -1, heads, d)
    logits = torch.einsum("bthd,bnhd->bhtn", q.float().reshape(b, t, heads, d), keys) * d**-0.5
    visible = column <= (seen.long()[:, None] + index)[..., None]
    weights = torch.softmax(logits.masked_fill(~visible[:, None], float("-inf")), dim=-1)
    out = torch.einsum("bhtn,bnhd->bthd", weights, values).reshape(b, t, width)
    return torch.where(real[..., None], out, 0.0)


def sink_gate(q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, k_base: Tensor, bias: Tensor) -> Tensor:
    """Fast KVzip's gate: how a token fares against learned sinks, (B, Hkv, T) fp32 in (0, 1].

    q (B, T, Hkv * G * r), k (B, T, Hkv * r) and the norms' weights (r,); k_base (Hkv, 1, S, r): the sinks' keys, not
    normalized; bias (Hkv, 1, G). With q and k normalized (RMS, eps 1e-6): l = q . k / sqrt(r) + bias, l_s = q .
    k_base_s / sqrt(r), score = mean over the group of 1 / (1 + sum_s exp(l_s - l)).
    """
    heads, _, group = bias.shape
    rank = q_norm.shape[0]

    def normalized(x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.float()

    queries = normalized(q.unflatten(-1, (heads, group, rank)), q_norm)
    keys = normalized(k.unflatten(-1, (heads, 1, rank)), k_norm)
    own = (queries * keys).sum(-1) / rank**0.5 + bias.float()[:, 0]
    sinks = torch.einsum("bthgr,hsr->bthgs", queries, k_base.float()[:, 0]) / rank**0.5
    score = 1 / (1 + torch.exp(sinks - own[..., None]).sum(-1))
    return score.mean(-1).transpose(1, 2).contiguous()


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
    """See `kvrewrite::kept_above`."""
    live = places >= 0
    seen = visible_later(places, live, places.amax((1, 2)), window, chunk)
    passes = scores >= threshold  # not a number does not
    passes = passes | (ranks_from_newest(places, live) < recent[:, None, None]) | (evicts == 0)[:, None, None]
    return torch.minimum(keep, (seen & passes).sum(-1).to(keep.dtype))


def share_layers(
    scores: list[Tensor], places: list[Tensor], keep: list[Tensor], recent: Tensor, sinks: int
) -> list[Tensor]:
    """See `kvrewrite::share_layers`."""
    total = torch.stack([k.long().sum(-1) for k in keep]).sum(0)
    live = [p >= 0 for p in places]
    held = torch.stack([x.sum((1, 2)) for x in live]).sum(0)
    if bool((held <= total).all()):
        return [x.sum(-1).to(torch.int32) for x in live]
    worth = []
    for score, place, there in zip(scores, places, live):
        safe = (place < sinks) | (ranks_from_newest(place, there) < recent[:, None, None])
        value = torch.nan_to_num(score.float(), nan=-3.3e38, posinf=3e38, neginf=-3e38)
        worth.append(value.masked_fill(safe, float("inf")).masked_fill(~there, float("-inf")).flatten(1))
    flat = torch.cat(worth, dim=1)
    order = torch.argsort(flat, dim=1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    stays = (place < total[:, None]) & (flat > float("-inf"))
    parts = stays.split([w.shape[1] for w in worth], dim=1)
    return [part.reshape(p.shape).sum(-1).to(torch.int32) for part, p in zip(parts, places)]
