"""H2O: heavy hitters by accumulated attention, and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keeps the `recent_tokens` newest slots and the slots that received most attention so far (Zhang et al., arXiv
    2306.14048, algorithm 1; code FMInference/H2O).

    The score of a slot is the running sum over all past queries of its softmax weight, per kv head; with grouped queries
    the sum also runs over the group's heads, which the original leaves open. At prefill the sum runs over all prompt
    queries (chunk=None, the default) or chunk by chunk. recent_tokens=None is half the budget, as in the authors' harness.
    """

    name = "h2o"
    summary = "what received most attention so far, and a recent window"
    source = "arXiv 2306.14048"
    evicts_when = "prompt or chunks, decoding"
    latent_scores = True

    budget: int | float | None = 1024
    recent_tokens: int | None = None

    def recent_of(self, keep: int) -> int:
        """The protected window: half of what stays, or as many as given."""
        return keep // 2 if self.recent_tokens is None else self.recent_tokens

    @property
    def recent(self) -> int:
        """The window where it does not depend on the budget."""
        if self.recent_tokens is not None:
            return self.recent_tokens
        return self.budget // 2 if isinstance(self.budget, int) else 0

    def validate(self) -> None:
        """Room for heavy hitters next to the window."""
        self.require_budget()
        if self.recent_tokens is not None and self.recent_tokens < 0:
            raise OptionError(f"h2o: recent_tokens is {self.recent_tokens}, expected 0 or more")
        super().validate()

    def score(self, site: Site) -> Scores:
        """What every slot has received so far plus what these queries give."""
        cached, new = site.split(site.observe(site.every_row()))
        return Scores(new, slots=site.stored_scores() + cached)
