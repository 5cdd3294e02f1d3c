"""TOVA: what the last query attends to, one set of tokens per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Token omission via attention (Oren et al., arXiv 2401.06104, section 3.3; code schwartz-lab-NLP/TOVA); NACL's paper
    calls it MSRNN.

    score_j = mean over all query heads of the last query's softmax weight on j, renewed at every step; the `budget` best
    stay, the same in all heads of a layer. Nothing is protected: neither the first tokens nor the newest. A prompt is
    reduced once, with its last query (chunk=None), or chunk by chunk, each with its own last query.
    """

    name = "tova"
    summary = "what the last query attends to, one set per layer"
    source = "arXiv 2401.06104"
    evicts_when = "prompt or chunks, decoding"
    needs_question = True
    scores_per_head = False
    latent_scores = True
    aliases = ("msrnn",)  # in NACL's paper

    budget: int | float | None = 1024

    def validate(self) -> None:
        """A budget is needed."""
        self.require_budget()
        super().validate()

    def score(self, site: Site) -> Scores:
        """The last query's weights, averaged over heads."""
        mass = site.observe(site.newest_rows(1), newest=1)
        mean = mass.sum(dim=1, keepdim=True) * (1 / site.heads)
        cached, new = site.split(site.all_heads(mean))
        return Scores(new, slots=cached)
