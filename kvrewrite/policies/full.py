"""Keeps everything, up to a capacity: the baseline, and the way to check a rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """No eviction. `budget` is a capacity here: a longer text is refused with an error; None grows without limit."""

    name = "full"
    summary = "everything, up to a capacity: the baseline"
    source = "-"
    evicts_when = "never"
    evicts_ever = False
    has_scores = False
    latent_scores = True

    chunk: int | None = 2048
    decode_eviction: bool = False

    @property
    def capacity(self) -> int | None:
        """The budget."""
        return self.budget if isinstance(self.budget, int) else None

    @property
    def rates_prompts_only(self) -> bool:
        """Nothing ever goes."""
        return True

    def validate(self) -> None:
        """A capacity is a number of slots, the same in all layers."""
        if isinstance(self.budget, float):
            raise OptionError(f"full: budget is {self.budget}, expected a whole number of slots (its capacity) or None")
        if self.layer_budgets != "equal":
            raise OptionError(f"full: layer_budgets is {self.layer_budgets!r}, but it evicts nothing; expected equal")

    def score(self, site: Site) -> Scores:
        """No score is ever compared; the position is as good as any."""
        return Scores(site.position_scores())

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Chunks without eviction."""
        step = self.chunk or max(1, length)
        return [Segment(min(step, length - at), UNLIMITED) for at in range(0, length, step)]
