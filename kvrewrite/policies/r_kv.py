"""R-KV: what the last queries attend to, and no other key says already."""

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
class RKV(Policy):
    """R-KV (Cai et al., arXiv 2505.24133, section 3; code Zefan-Cai/R-KV: r1_kv.py), for long reasoning.

    score_j = share * I_j - (1 - share) * R_j, (B, Hkv, C + T). Importance: with l_ij the largest logit
    among a group's query heads, softmax_j(l_ij) over the slots before the `window` newest, averaged
    over the last `window` queries i, and the largest of `kernel` neighbours. Redundancy: R =
    softmax_j(mean over i of cos(k_i, k_j)) over all slots, where every slot i leaves out itself and the
    newest j that is like it (cosine above 0.5), so that of keys which say the same the newest is not
    blamed. The `window` newest stay. A prompt is cut down to `budget`; then, as soon as a head holds
    budget + buffer slots, its `budget` best stay.

    share=0.1 as in the paper. Where nothing is like slot i the authors' code leaves out the oldest slot;
    here nothing is. Their slots lie in the order of the last ranking, ours by position, which is what
    neighbours and "newest" go by. The last queries are carried as they were rotated: original positions.
    """

    name = "r_kv"
    summary = "attention of the last queries, less what other keys say as well"
    source = "arXiv 2505.24133"
    evicts_when = "when budget + buffer slots are held"
    inputs = ("evicts",)

    budget: int | float | None = 1024
    buffer: int = 128
    window: int = 8
    kernel: int = 7
    share: float = 0.1

    @property
    def recent(self) -> int:
        """The newest tokens, whose queries judge."""
        return self.window

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        for option in ("buffer", "window"):
            if getattr(self, option) < 1:
                raise OptionError(f"r_kv: {option} is {getattr(self, option)}, expected at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"r_kv: kernel is {self.kernel}, expected an odd number (tokens to both sides)")
        if not 0 <= self.share <= 1:
            raise OptionError(f"r_kv: share is {self.share}, expected a number between 0 and 1")
        if self.layer_budgets != "equal" or self.head_budgets != "equal" or self.positions != "original":
            raise OptionError(
                f"r_kv: layer_budgets is {self.layer_budgets}, head_budgets {self.head_budgets} and positions "
                f"{self.positions}; it cuts all heads of all layers down at the same token, and keeps queries at the "
                "positions that they had; expected equal, equal and original"
            )
        super().validate()

    def of_rank(self, rank: int, ranks: int) -> Policy:
        """Queries that are carried are those of all heads."""
        raise OptionError("r_kv: it carries queries, which tensor parallelism can't deal out; use one process")

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """As others; what evicts is scored."""
        return [self._scored(segment) for segment in super().plan(length, row)]

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """Cut down when the buffer is full."""
        budget = self.slots(row.seen + 1)
        full = self.decode_eviction and row.held + 1 >= budget + self.buffer
        segment = self.segment(1, budget if full else UNLIMITED, prompt=False)
        return self._scored(self.protecting([segment], row)[0])

    @staticmethod
    def _scored(segment: Segment) -> Segment:
        return replace(segment, values={**segment.values, "evicts": int(segment.keep != UNLIMITED)})

    def score(self, site: Site) -> Scores:
        """Scored anew at every eviction; nothing that is stored counts."""
        shape = (site.heads, self.window, site.facts.head_dim)
        queries = site.ops.recent_queries(site.q, site.state(f"queries_{site.layer}", shape, "float32"), site.valid)
        scores = site.ops.joint_scores(
            queries,
            site.keys(),
            site.slot_positions(),
            site.scale,
            self.kernel,
            float(self.share),
            site.input("evicts"),
        )
        return Scores(site.split(scores)[1], select=scores)
