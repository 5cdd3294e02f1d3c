"""NACL: proxy tokens and random eviction, once for the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.policies.site import Site

LARGE = 1e30  # above any score


@register
@dataclass(frozen=True, kw_only=True)
class NACL(Policy):
    """NACL (Chen et al., ACL 2024, arXiv 2408.03675, algorithm 1 and table 4; code PaddlePaddle/Research ACL2024-NACL).

    F_j = sum over the proxy queries (the last tokens of the prompt) and the query heads of a group of their softmax weight
    on j. Of the C = budget slots of a head a few are protected, some are the best by F, and the rest is drawn at random
    without replacement from what is left, with probability proportional to exp(F_j) (the paper's softmax over F). The
    draw is a hash of (seed, layer, kv head, position), so each head has its own. One eviction, layer by layer, at a row's
    first prompt; while decoding the same every `interval` generated tokens, whose queries are the proxies then (the paper
    evicts every m steps and gives no m; interval=0 never does, as the released code).

    preset="paper" (table 4 at 20%): proxies are the last fifth of the prompt; a tenth of C is protected (the newest), and
    two thirds of the rest are random. preset="code": proxies are 1% of the prompt, a twentieth of C is protected (half of
    it, at most 256, at the beginning), and 7/19 of the rest are random. Fractions of a prompt are rounded down.
    """

    name = "nacl"
    summary = "attention of proxy tokens, and a random sample"
    source = "arXiv 2408.03675"
    evicts_when = "first prompt, every m tokens"
    whole_prompt = True
    needs_question = True
    scores_per_head = False  # part of what stays is drawn by lot
    inputs = ("proxies", "first_tokens", "evicts")
    latent_scores = True

    budget: int | float | None = 0.2
    preset: str = "paper"
    seed: int = 0
    interval: int = 128

    @property
    def rates_prompts_only(self) -> bool:
        """With interval=0."""
        return not self.interval or not self.decode_eviction

    def validate(self) -> None:
        """A known preset."""
        self.require_budget()
        if self.preset not in ("paper", "code"):
            raise OptionError(f'nacl: preset is {self.preset!r}, expected "paper" or "code"')
        if self.interval < 0:
            raise OptionError(f"nacl: interval is {self.interval}, expected 0 (never while decoding) or more")
        super().validate()

    def _evicting(self, length: int, budget: int, proxies: int, prompt: bool) -> Segment:
        protected = int((0.1 if self.preset == "paper" else 0.05) * budget)
        first = 0 if self.preset == "paper" else min(256, protected // 2)
        values = {"proxies": proxies, "first_tokens": first, "evicts": 1}
        return Segment(length, budget, protected - first, values, prompt)

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """One eviction, at the first prompt. The statistics of decoding begin anew at every prompt."""
        if row.seen:
            return [Segment(length, UNLIMITED, values={"evicts": 1})]
        proxies = int(length * (0.2 if self.preset == "paper" else 0.01))
        return [self._evicting(length, self.slots(length), max(1, proxies), True)]

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """An eviction every `interval` tokens; between them their queries' attention adds up."""
        if not self.interval or not self.decode_eviction or (row.generated + 1) % self.interval:
            return Segment(1, UNLIMITED, values={"proxies": 1}, prompt=False)
        return self._evicting(1, self.slots(row.seen + 1), 1, False)

    def score(self, site: Site) -> Scores:
        """F is summed up in the stored scores; what stays is decided by rank and by lot."""
        first_tokens, evicts = site.per_row(site.input("first_tokens")), site.per_row(site.input("evicts")) > 0
        most = site.q.shape[2] // (5 if self.preset == "paper" else 100) + 1
        cached, new = site.split(site.observe(site.newest_rows(site.input("proxies")), newest=most))
        total = site.stored_scores() + cached
        received, places = site.join(total, new), site.slot_positions()
        first = places < first_tokens
        protected = first | (site.ops.newest_ranks(places) < site.per_row(site.recent))
        best = site.ops.ranks(received, (places >= 0) & ~protected) < self._best(site).unsqueeze(2)
        exponential = -site.ops.uniform(places, self.seed, site.layer).log()
        lot = received - exponential.log()  # F plus a Gumbel variable
        select = lot.masked_fill(best | first, LARGE)
        return Scores(new.masked_fill(evicts, 0.0), slots=total.masked_fill(evicts, 0.0), select=select)

    def _best(self, site: Site) -> Tensor:
        """How many stay by F alone, (B, Hkv): what the layer's budget leaves beside the protected and the random ones."""
        rest = site.keep.long() - (site.recent + site.input("first_tokens")).unsqueeze(1)
        part, whole = (2, 3) if self.preset == "paper" else (12, 19)
        share = rest * part // whole
        return rest - share if self.preset == "paper" else share
