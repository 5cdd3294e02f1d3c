"""Scissorhands: tokens that were important stay important."""

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
class Scissorhands(Policy):
    """Scissorhands (Liu et al., arXiv 2305.17118, algorithms 1 and 2).

    When a row's cache would hold more than `budget` slots, it is compressed to budget - int(drop * budget): a slot's
    importance is how often (over the last `history` queries and the query heads of a group) it received more than 1 / t of
    a query's attention, t being the number of tokens up to that query; the recent_tokens newest slots stay. Counting
    restarts at each compression. The printed pseudo-code leaves the sign open: here the least important go.

    Only counts are stored, so the window of queries is laid before the compression that decoding will reach. A prompt that
    goes beyond it, but is shorter than `history`, is compressed by all queries counted so far, up to its length more. The
    paper gives later layers more slots, without a schedule; here all have the same.
    """

    name = "scissorhands"
    summary = "what received more than its share of attention lately"
    source = "arXiv 2305.17118"
    evicts_when = "at once, when the budget is full"
    inputs = ("first_query", "compresses")
    latent_scores = True
    protects_prompts = False

    budget: int | float | None = 1024
    drop: float = 0.5
    recent_tokens: int = 10
    history: int = 400

    @property
    def recent(self) -> int:
        """The protected window."""
        return self.recent_tokens

    def validate(self) -> None:
        """What stays must hold the window."""
        self.require_budget()
        for option in ("layer_budgets", "head_budgets"):
            if getattr(self, option) != "equal":
                raise OptionError(
                    f"scissorhands: {option} is {getattr(self, option)!r}, but it compresses all heads of all layers at the same "
                    "token; expected equal"
                )
        if not 0 < self.drop < 1:
            raise OptionError(f"scissorhands: drop is {self.drop}, expected a share of the budget between 0 and 1")
        if self.history < 1 or self.recent_tokens < 0:
            raise OptionError(
                f"scissorhands: history is {self.history} and recent_tokens {self.recent_tokens}; expected at least 1 and 0"
            )
        if isinstance(self.budget, int) and self._kept(self.budget) <= self.recent_tokens:
            raise OptionError(
                f"scissorhands: budget is {self.budget}, of which {self._kept(self.budget)} slots stay after a compression, but "
                f"{self.recent_tokens} recent tokens are always kept; expected a larger budget"
            )

    def _kept(self, budget: int) -> int:
        return budget - int(self.drop * budget)

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Chunk by chunk, compressing where the budget is exceeded."""
        step = self.chunk or max(1, length)
        lengths = [min(step, length - at) for at in range(0, length, step)]
        return self._segments(lengths, row, self.slots(row.seen + length), True)

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """Compresses when the budget is exceeded."""
        if not self.decode_eviction:
            return Segment(1, UNLIMITED, self.recent_tokens, {"first_query": UNLIMITED}, False)
        return self._segments([1], row, self.slots(row.seen + 1), False)[0]

    def _segments(self, lengths: list[int], row: RowState, budget: int, prompt: bool) -> list[Segment]:
        held, ends = row.held, []  # ends: (the row's tokens after the segment, whether it compresses)
        for i, n in enumerate(lengths):
            held += n
            ends.append((row.seen + sum(lengths[: i + 1]), held > budget))
            held = self._stays(budget) if held > budget else held
        following = self._following(ends[-1][0], held)
        segments = []
        for i, (n, (_, compresses)) in enumerate(zip(lengths, ends)):
            at = next((end for end, does in ends[i:] if does), following)
            values = {"first_query": max(0, at - self.history), "compresses": int(compresses)}
            keep = self._stays(budget) if compresses else UNLIMITED
            segments.append(Segment(n, keep, self.recent_tokens, values, prompt))
        return segments

    def _following(self, seen: int, held: int) -> int:
        """The row's tokens when decoding compresses next: as soon as one more is held than the budget allows."""
        if isinstance(self.budget, int):
            return seen + self.budget + 1 - held
        assert self.budget is not None
        more = max(1, int((self.budget * seen - held) / (1 - self.budget)) - 2)
        while held + more <= self.slots(seen + more):
            more += 1
        return seen + more

    def _stays(self, budget: int) -> int:
        """Slots after a compression."""
        return max(self._kept(budget), self.recent_tokens + 1)

    def score(self, site: Site) -> Scores:
        """Counts so far and those of the new queries that lie in the window."""
        first = site.input("first_query").unsqueeze(1)
        counted = (site.positions >= first).float()
        share = (site.positions.float() + 1).reciprocal()
        # The window ends at or after the segment's last token, so no earlier query than the last `history` counts.
        cached, new = site.split(site.observe(counted, above=share, newest=self.history))
        # Where the window begins among the new queries, what was counted before is too old.
        fresh = (first >= site.positions[:, :1]).unsqueeze(2)
        total = site.stored_scores().masked_fill(fresh, 0.0) + cached
        restarts = site.per_row(site.input("compresses")) > 0
        select = site.join(total, new)
        return Scores(new.masked_fill(restarts, 0.0), slots=total.masked_fill(restarts, 0.0), select=select)
