"""Random Attention: the prompt stays, and generated tokens are drawn by lot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class RandomAttention(Policy):
    """Random Attention (Wang et al., arXiv 2609.03430, section 3, equation 3 and algorithm 1; code
    SalesforceAIResearch/Random-Attention: random_pp).

    At every eviction each slot of each kv head draws a new number, (B, Hkv, C + T): infinite for
    the prompt, else uniform in (0, 1); the largest stay beside the `buffer` newest, which always
    do. Evictions come as soon as a head holds budget + buffer slots, so every `buffer` tokens, and
    leave `budget` (the paper's K + r; its buffer is r). A draw is a hash of (seed, layer, kv head,
    position, tokens of the row so far), so that a row keeps the same in any batch.

    The prompt is a row's first (protect_prompt); prompts that do not fit the budget are refused,
    where the authors' code cuts them. Further prompts compete with what was generated.
    """

    name = "random_attention"
    summary = "the prompt, a recent window, and generated tokens by lot"
    source = "arXiv 2609.03430"
    evicts_when = "when budget + buffer slots are held"
    latent_scores = True
    scores_per_head = False  # what stays is drawn by lot
    inputs = ("draw",)

    budget: int | float | None = 2048
    buffer: int = 128
    seed: int = 0
    protect_prompt: bool = True

    @property
    def recent(self) -> int:
        """The newest tokens take part in no draw."""
        return self.buffer

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        if self.buffer < 1:
            raise OptionError(f"random_attention: buffer is {self.buffer}, expected at least 1")
        if self.layer_budgets != "equal":
            raise OptionError(
                f"random_attention: layer_budgets is {self.layer_budgets!r}, but it cuts all layers down at the "
                "same token; expected equal"
            )
        super().validate()

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """As others, each segment with a draw of its own."""
        end, segments = row.seen, []
        for segment in super().plan(length, row):
            end += segment.length
            segments.append(replace(segment, values={**segment.values, "draw": end}))
        return segments

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """Cut down when the buffer is full."""
        budget = self.slots(row.seen + 1)
        full = self.decode_eviction and row.held + 1 >= budget + self.buffer
        values = {"draw": row.seen + 1}
        segment = self.segment(1, budget if full else UNLIMITED, values=values, prompt=False)
        return self.protecting([segment], row)[0]

    def score(self, site: Site) -> Scores:
        """A number by position and draw; nothing that is stored counts."""
        mixed = site.slot_positions() + site.per_row(site.input("draw")).long() * (1 << 32)
        drawn = site.ops.uniform(mixed, self.seed, site.layer)
        return Scores(site.split(drawn)[1], select=drawn)
