"""Random eviction: the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keeps a random set in every head. A slot's score is a hash of (seed, layer, kv head, position in the text), so the same
    tokens stay whatever the batch, the chunking or the device."""

    name = "random"
    summary = "a random set in every head"
    source = "-"
    evicts_when = "prompt or chunks, decoding"
    latent_scores = True

    budget: int | float | None = 1024
    seed: int = 0

    def validate(self) -> None:
        """A budget is needed."""
        self.require_budget()
        super().validate()

    def score(self, site: Site) -> Scores:
        """A number in (0, 1) by position."""
        return Scores(site.ops.uniform(site.all_heads(site.positions), self.seed, site.layer))
