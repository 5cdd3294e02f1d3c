"""SirLLM: the tokens that surprised the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, RowState, Segment
from kvrewrite.policies.streaming_llm import ContiguousWherePossible

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class SirLLM(ContiguousWherePossible):
    """SirLLM (Yao et al., arXiv 2405.12528, section 3; code Zoeyyao27/SirLLM).

    score_j = -log p(x_j | what the model kept of the text before it): the paper's "token entropy". The first `start` tokens,
    the recent_tokens newest and, of the others, those of largest score stay: the same in every layer and head. At each
    further prompt (a turn of a conversation) all stored scores are multiplied by `decay` first. Keys are re-ranked in the
    cache as in StreamingLLM where the model has RoPE (positions="auto").

    The authors evict before a turn, with room for the answer reserved; here the cache is within the budget after each
    chunk and each generated token. Scores need the logits, so the new keys and values of a chunk stay alive in all layers
    until the model is through; hence chunk=512.
    """

    name = "sirllm"
    summary = "tokens that surprised the model; old turns fade"
    source = "arXiv 2405.12528"
    evicts_when = "chunks, decoding"
    after_logits = True
    scores_per_head = False
    inputs = ("turn",)
    latent_scores = True

    budget: int | float | None = 1024
    start: int = 4
    recent_tokens: int = 0
    decay: float = 1.0
    chunk: int | None = 512

    @property
    def sinks(self) -> int:
        """The first tokens."""
        return self.start

    @property
    def recent(self) -> int:
        """The protected window."""
        return self.recent_tokens

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        if self.start < 0 or self.recent_tokens < 0 or not 0 <= self.decay <= 1:
            raise OptionError(
                f"sirllm: start is {self.start}, recent_tokens {self.recent_tokens} and decay {self.decay}; expected at least "
                "0, at least 0, and between 0 and 1"
            )
        super().validate()

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """The first segment of a further prompt is where old scores fade."""
        segments = super().plan(length, row)
        if row.seen and segments:
            segments[0] = dataclasses.replace(segments[0], values={**segments[0].values, "turn": 1})
        return segments

    def score(self, site: Site) -> Scores:
        """Surprisal, the same for all heads of all layers."""
        last = site.state("last_logits", (site.logits.shape[-1],), "float32")
        where = (site.input("input_ids"), site.valid, last, site.positions)
        new = site.all_heads(site.once("surprisal", lambda: site.ops.surprisal(site.logits, *where)))
        if self.decay == 1:  # nothing fades, so forks can share the scores that are stored
            return Scores(new)
        old = site.stored_scores()
        return Scores(new, slots=(old * self.decay).where(site.per_row(site.input("turn")) > 0, old))
