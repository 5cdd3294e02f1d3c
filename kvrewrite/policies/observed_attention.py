"""Observed attention: what a token received from each query that could see it, on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class ObservedAttention(Policy):
    """H2O's sum divided by its number of terms (NVIDIA/kvpress: ObservedAttentionPress; related to
    H2O, arXiv 2306.14048).

    score_j = (sum over all queries i >= j so far, and over the query heads of a group, of their
    softmax weight on j) / (number of tokens from j on), (B, Hkv, C + T). So late tokens, which few
    queries have seen, are not at a disadvantage. Nothing is protected. A prompt is reduced once
    (chunk=None, as kvpress does) or chunk by chunk; generated tokens count on.
    """

    name = "observed_attention"
    summary = "attention received per query that saw the token"
    source = "NVIDIA/kvpress"
    evicts_when = "prompt or chunks, decoding"
    latent_scores = True

    budget: int | float | None = 1024

    def validate(self) -> None:
        """A budget is needed."""
        self.require_budget()
        super().validate()

    def score(self, site: Site) -> Scores:
        """Sums are stored; the eviction goes by the means."""
        cached, new = site.split(site.observe(site.every_row()))
        total = site.stored_scores() + cached
        seen = site.positions[:, 0] + site.valid
        queries = (site.per_row(seen) - site.slot_positions()).clamp(min=1)
        return Scores(new, slots=total, select=site.join(total, new) / queries)
