"""Compactor and its two halves: keys that others do not explain, and attention from both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.policies.site import Site


def sketched_leverage(site: Site, size: int, seed: int, first: int = 0, last: int = 0) -> Tensor:
    """Leverage scores of the new tokens' keys (B, Hkv, T), by a Gaussian sketch of `size` numbers a
    key, which is a hash of (seed, layer, kv head)."""
    import torch

    keys = site.key_before_rope
    count = site.facts.head_dim * size
    places = torch.arange(2 * count, device=keys.device).expand(1, site.kv_heads, -1)
    drawn = site.ops.uniform(places, seed, site.layer)[0]
    normal = (-2 * drawn[:, :count].log()).sqrt() * (2 * math.pi * drawn[:, count:]).cos()
    sketch = normal.unflatten(1, (site.facts.head_dim, size)) / size**0.5
    return site.ops.leverage(keys, sketch, site.valid, first, last)


def two_sided_attention(site: Site, block: int, first: int = 0, last: int = 0) -> Tensor:
    """Attention within blocks times the norm of the value, averaged over three neighbours: (B, Hkv,
    T)."""
    import torch

    mass = site.ops.block_column_mass(site.q, site.k, site.valid, block, first, last)
    # Padding may be anything, and has no mass.
    weighed = torch.where(mass > 0, mass * site.v.float().norm(dim=-1), 0.0)
    wide = torch.nn.functional.pad(weighed, (1, 1))
    return (wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]) / 3


class _Sketching(Policy):
    """What the options of a sketch may be."""

    sketch: int
    seed: int

    def _check_sketch(self) -> None:
        if self.sketch < 1:
            raise OptionError(f"{self.name}: sketch is {self.sketch}, expected at least 1")


@register
@dataclass(frozen=True, kw_only=True)
class Leverage(_Sketching):
    """Leverage scores (Chari and Van Durme, arXiv 2507.08143; code NVIDIA/kvpress:
    LeverageScorePress).

    With X (n, sketch) the keys of a head before RoPE less their mean, times a Gaussian matrix /
    sqrt(sketch): score_j is the j-th number on the diagonal of X (X^T X + 0.01)^-1 X^T, (B, Hkv,
    T). Keys that the others do not explain have a large one. The sketch is a hash of (seed, layer,
    kv head), not a draw, so that a text always keeps the same. Evicts once, at a row's first
    prompt; no question and no attention are needed.
    """

    name = "leverage"
    summary = "keys that the other keys do not explain"
    source = "arXiv 2507.08143"
    evicts_when = "first prompt"
    whole_prompt = True

    budget: int | float | None = 2048
    sketch: int = 48
    seed: int = 0

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        self._check_sketch()
        super().validate()

    def score(self, site: Site) -> Scores:
        """Of the whole prompt."""
        return Scores(sketched_leverage(site, self.sketch, self.seed))


@register
@dataclass(frozen=True, kw_only=True)
class NonCausalAttention(Policy):
    """Attention from both sides (Chari and Van Durme, arXiv 2507.08143; code NVIDIA/kvpress:
    NonCausalAttnPress).

    A prompt is cut into blocks of `block` tokens. mass_j = sum over all queries i of j's block,
    also those before j, of softmax_j(q_i . k_j) over the block, averaged over a group's heads;
    score_j = the mean of mass * ||v|| over j - 1, j and j + 1 (zeros beyond the ends), (B, Hkv, T).
    q . k is not divided by sqrt(D): so the authors have it. Evicts once, at a row's first prompt.
    In kvpress the padding of the last block takes part in its softmax; here it does not.
    """

    name = "non_causal_attn"
    summary = "attention within blocks from both sides x norm of the value"
    source = "arXiv 2507.08143"
    evicts_when = "first prompt"
    whole_prompt = True

    budget: int | float | None = 2048
    block: int = 256

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        if self.block < 1:
            raise OptionError(f"non_causal_attn: block is {self.block}, expected at least 1")
        super().validate()

    def score(self, site: Site) -> Scores:
        """Of the whole prompt."""
        return Scores(two_sided_attention(site, self.block))


@register
@dataclass(frozen=True, kw_only=True)
class Compactor(_Sketching):
    """Compactor (Chari and Van Durme, arXiv 2507.08143; code NVIDIA/kvpress: CompactorPress).

    score_j = blending * z(`leverage`) + z(`non_causal_attn`), (B, Hkv, T), where z(x) = (x - mean)
    / deviation over a row's tokens and a layer's heads. The `start` first and recent_tokens newest
    tokens stay and take no part. blending=None is the share of the prompt that goes, as in the
    authors' press for kvpress. Evicts once, at a row's first prompt; it needs no question.
    """

    name = "compactor"
    summary = "leverage scores + attention within blocks"
    source = "arXiv 2507.08143"
    evicts_when = "first prompt"
    whole_prompt = True

    budget: int | float | None = 2048
    start: int = 8
    recent_tokens: int = 4
    block: int = 256
    sketch: int = 48
    seed: int = 0
    blending: float | None = None

    @property
    def sinks(self) -> int:
        """The first tokens."""
        return self.start

    @property
    def recent(self) -> int:
        """The newest tokens."""
        return self.recent_tokens

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        self._check_sketch()
        for option, least in (("start", 0), ("recent_tokens", 0), ("block", 1), ("blending", 0)):
            if (value := getattr(self, option)) is not None and value < least:
                raise OptionError(f"compactor: {option} is {value}, expected at least {least}")
        super().validate()

    def score(self, site: Site) -> Scores:
        """Of the whole prompt, without its ends."""
        ends = (self.start, self.recent_tokens)
        leverage = self._standard(site, sketched_leverage(site, self.sketch, self.seed, *ends))
        attention = self._standard(site, two_sided_attention(site, self.block, *ends))
        if self.blending is not None:
            return Scores(leverage * self.blending + attention)
        share = 1 - site.keep.float() / site.valid.float().clamp(min=1).unsqueeze(1)
        return Scores(leverage * share.clamp(min=0).unsqueeze(2) + attention)

    def _standard(self, site: Site, x: Tensor) -> Tensor:
        """With mean 0 and deviation 1 over the tokens of a row that take part, and all heads."""
        import torch

        index = torch.arange(x.shape[2], device=x.device)
        inside = (index >= self.start) & (index < (site.valid - self.recent_tokens).unsqueeze(1))
        inside = site.all_heads(inside)
        count = inside.sum((1, 2), keepdim=True)
        mean = torch.where(inside, x, 0.0).sum((1, 2), keepdim=True) / count.clamp(min=1)
        apart = torch.where(inside, x - mean, 0.0)
        deviation = (apart.square().sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        return apart / deviation.clamp(min=1e-6)
