"""More decoders that are not from transformers, for the table of docs/coverage.md; see tests/support/foreign.py for the first.

Each writes attention in a way of its own, after what is common in code outside of transformers. Every class is built
without arguments, has vocabulary 97 and maps `input_ids` (batch, length) to logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.foreign import FOREIGN, HEAD_DIM, HEADS, HIDDEN, MAX_LENGTH, Decoder, Projections, angles

KV_HEADS, WINDOW = 2, 8


class EinsumAttention(Projections):
    """(batch, length, heads, head dim) all the way, with products written as einsum."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, HEAD_DIM).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD_DIM)
        future = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, HIDDEN))


class Einsum(Decoder):
    """Attention written with einsum over (batch, length, heads, head dim)."""

    def make_attention(self) -> nn.Module:
        return EinsumAttention()


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring pairs of (batch, length, heads, dim) by `table` (length, dim / 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.shape[1], 1, pairs.shape[3], 2)
    real = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
    imaginary = pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]
    return torch.stack([real, imaginary], -1).flatten(3).type_as(x)


class GroupedAttention(nn.Module):
    """Grouped queries in the way of gpt-fast: one projection, rotation of pairs, a cache module that may be absent."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.wqkv = nn.Linear(HIDDEN, HIDDEN + 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.kv_cache: nn.Module | None = None

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        kv = KV_HEADS * HEAD_DIM
        q, k, v = self.wqkv(x).split([HIDDEN, kv, kv], dim=-1)
        q = rotate_pairs(q.view(b, s, HEADS, HEAD_DIM), freqs)
        k = rotate_pairs(k.view(b, s, KV_HEADS, HEAD_DIM), freqs)
        v = v.view(b, s, KV_HEADS, HEAD_DIM)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kv_cache is not None:
            k, v = self.kv_cache(k, v)
        groups = HEADS // KV_HEADS
        if self.how == "repeat_interleave":
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        elif self.how == "expand":
            k, v = (
                t[:, :, None].expand(b, KV_HEADS, groups, s, HEAD_DIM).reshape(b, HEADS, s, HEAD_DIM) for t in (k, v)
            )
        gqa = {"enable_gqa": True} if self.how == "enable_gqa" else {}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **gqa)
        return self.wo(y.transpose(1, 2).contiguous().view(b, s, HIDDEN))


class Rotated(Decoder):
    """A decoder whose positions are rotations only, from a table of cosines and sines."""

    has_wpe = False

    def __init__(self) -> None:
        super().__init__()
        table = torch.stack([angles().cos(), angles().sin()], -1)
        self.register_buffer("freqs", table, persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids)


class StaticCacheOff(Rotated):
    """As gpt-fast: positions as an index into the rotation table and into a causal mask; its static cache not set up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal_mask", torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool)))

    def make_attention(self) -> nn.Module:
        return GroupedAttention("repeat_interleave")

    def extras(self, ids: Tensor) -> tuple[Any, ...]:
        input_pos = torch.arange(ids.shape[1], device=ids.device)
        return self.freqs[input_pos], self.causal_mask[None, None, input_pos][..., : ids.shape[1]]


class GroupedExpand(Rotated):
    """Key and value heads expanded to the query heads before sdpa; as in torchtune."""

    def make_attention(self) -> nn.Module:
        return GroupedAttention("expand")

    def extras(self, ids: Tensor) -> tuple[Any, ...]:
        return self.freqs[: ids.shape[1]], None


class GroupedSdpa(GroupedExpand):
    """Grouped queries left to sdpa (`enable_gqa`)."""

    def make_attention(self) -> nn.Module:
        return GroupedAttention("enable_gqa")


class FunctionalAttention(nn.Module):
    """`F.multi_head_attention_forward` on (length, batch, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.randn(3 * HIDDEN, HIDDEN) * HIDDEN**-0.5)
        self.in_bias = nn.Parameter(torch.zeros(3 * HIDDEN))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        s = x.shape[0]
        mask = torch.full((s, s), float("-inf"), device=x.device).triu(1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, HIDDEN, HEADS, self.in_weight, self.in_bias, None, None, False, 0.0, self.out.weight, self.out.bias,
            training=False, need_weights=False, attn_mask=mask,
        )  # fmt: skip
        return y.transpose(0, 1)


class FunctionalMHA(Decoder):
    """`F.multi_head_attention_forward`, sequence first."""

    def make_attention(self) -> nn.Module:
        return FunctionalAttention()


class AlibiAttention(Projections):
    """ALiBi as its paper writes it: a bias linear in the distance, a slope for each head."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        at = torch.arange(x.shape[1], device=x.device)
        slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device=x.device) / HEADS)
        bias = (at[None] - at[:, None]) * slopes[:, None, None]
        bias = bias.masked_fill(at[None] > at[:, None], float("-inf"))
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]))


class Alibi(Decoder):
    """ALiBi given to sdpa as a float mask; no other positions."""

    has_wpe = False

    def make_attention(self) -> nn.Module:
        return AlibiAttention()

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids)


class CappedAttention(Projections):
    """Scores capped by tanh, a window made from distances, and normalized queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        at = torch.arange(x.shape[1], device=x.device)
        distance = at[:, None] - at[None]
        seen = (distance >= 0) & (distance < WINDOW)
        scores = self.q_norm(q) @ self.k_norm(k).transpose(-1, -2) * HEAD_DIM**-0.5
        scores = 3.0 * torch.tanh(scores / 3.0)
        return self.merge(torch.where(seen, scores, torch.finfo(scores.dtype).min).softmax(-1) @ v)


class CappedWindow(Decoder):
    """A sliding window with capped scores, written out."""

    def make_attention(self) -> nn.Module:
        return CappedAttention()


class SinkAttention(Projections):
    """One learned logit per head takes a part of the softmax, as an extra column that is dropped afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        b, _, s, _ = q.shape
        future = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(future, float("-inf"))
        sinks = self.sinks.view(1, HEADS, 1, 1).expand(b, HEADS, s, 1)
        return self.merge(torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v)


class Sinks(Decoder):
    """A learned sink in every head."""

    def make_attention(self) -> nn.Module:
        return SinkAttention()


class ParallelBlock(nn.Module):
    """Attention and MLP side by side, on one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = GroupedAttention("enable_gqa")
        self.gate, self.up = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, *args) + self.down(F.silu(self.gate(y)) * self.up(y))


class Parallel(GroupedExpand):
    """Parallel attention and MLP, SwiGLU, grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ParallelBlock() for _ in range(2))


class BucketedAttention(Projections):
    """A learned bias for each bucket of distances and head, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Embedding(8, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        at = torch.arange(x.shape[1], device=x.device)
        distance = at[:, None] - at[None]
        bias = self.relative(distance.clamp(0, 7)).permute(2, 0, 1)
        scores = (q @ k.mT + bias).masked_fill(distance < 0, float("-inf"))
        return self.merge(scores.softmax(-1) @ v)


class BucketedBias(Decoder):
    """T5's relative bias: refused, since a bias by distance is more than a slope."""

    def make_attention(self) -> nn.Module:
        return BucketedAttention()


class TalkingAttention(Projections):
    """Heads whose weights are mixed after the softmax (talking heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(HEADS) + 0.1 * torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(future, float("-inf")).softmax(-1)
        return self.merge(torch.einsum("gh,bhqk->bgqk", self.mix, weights) @ v)


class TalkingHeads(Decoder):
    """Talking heads: refused, since the weights of a head are no softmax of its own scores."""

    def make_attention(self) -> nn.Module:
        return TalkingAttention()


MODULES: dict[str, type[Decoder]] = {
    c.__name__: c
    for c in (
        Einsum,
        StaticCacheOff,
        GroupedExpand,
        GroupedSdpa,
        FunctionalMHA,
        Alibi,
        CappedWindow,
        Sinks,
        Parallel,
        BucketedBias,
        TalkingHeads,
    )
}
ALL_MODULES = {**FOREIGN, **MODULES}
