"""FINCH: what the question attends to, each query weighted by how many tokens it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.streaming_llm import ContiguousWherePossible

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class Finch(ContiguousWherePossible):
    """FINCH (Corallo and Papotti, TACL 2024, doi 10.1162/tacl_a_00716; code
    NVIDIA/kvpress: FinchPress).

    score_j = sum over the last `window` queries i (the question) and the query heads of a group of
    a_ij * n_i, where n_i is the number of tokens before i: without it the weights of later queries
    are smaller because there are more of them. normalize=False leaves n_i out. The window itself
    stays. Evicts once, at a row's first prompt; kept keys are rotated anew by their place in
    the cache (positions="auto": contiguous where the model has RoPE).

    The paper repeats the question in every chunk of the context; here, as in kvpress, context and
    question are one prompt that goes through once. `window` is the length of the question in
    tokens.
    """

    name = "finch"
    summary = "what the question attends to, normalized; re-rotated"
    source = "doi 10.1162/tacl_a_00716"
    evicts_when = "first prompt"
    whole_prompt = True
    needs_question = True
    latent_scores = True

    budget: int | float | None = 2048
    window: int = 32
    normalize: bool = True

    @property
    def recent(self) -> int:
        """The question stays."""
        return self.window

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        if self.window < 1:
            raise OptionError(f"finch: window is {self.window}, expected at least 1")
        super().validate()

    def score(self, site: Site) -> Scores:
        """The window's weighted attention. Only a first prompt is ever evicted from, so cached
        slots have no score."""
        rows = site.newest_rows(self.window)
        if self.normalize:
            rows = rows * site.positions.float()
        _, new = site.split(site.observe(rows, newest=self.window))
        return Scores(new)
