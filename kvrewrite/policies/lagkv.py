"""LagKV: a token counts by how it stands out from the block of tokens after its own."""

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
class LagKV(Policy):
    """LagKV (Liang et al., arXiv 2504.04704, section 3; code AI-Lab-China-Merchants-Bank/LagKV and
    NVIDIA/kvpress).

    After the first n_sink tokens a prompt is cut into blocks of lag_size. With lo and hi (D,) the
    least and largest value of each channel in the block after a token's own, u = (x - lo) / (hi -
    lo), and s(x) = softmax over the block of std(u): the token's score is (s(k) + s(v)) / 2, and
    what counts is its rank in its block, so that blocks keep alike. The last whole block and what
    follows it have nothing after them and stay, as do the first n_sink. across=True compares the
    scores themselves (kvpress: cross_scoring), for head_budgets=adakv. No attention and no queries
    are needed; (B, Hkv, T).

    Evicts once, at a row's first prompt, as kvpress does; lag_size=128 as there and in the authors'
    examples. A budget that does not hold the last block has the newest tokens. Channels that are
    constant in the next block say nothing.
    """

    name = "lagkv"
    summary = "keys and values that stand out from the next block's"
    source = "arXiv 2504.04704"
    evicts_when = "first prompt"
    whole_prompt = True

    budget: int | float | None = 2048
    n_sink: int = 4
    lag_size: int = 128
    across: bool = False

    @property
    def sinks(self) -> int:
        """The first tokens."""
        return self.n_sink

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        for option, least in (("n_sink", 0), ("lag_size", 2)):
            if getattr(self, option) < least:
                raise OptionError(f"lagkv: {option} is {getattr(self, option)}, expected at least {least}")
        super().validate()

    def score(self, site: Site) -> Scores:
        """Ranks below 1, and above 1 what has no block after it."""
        return Scores(site.ops.lag_scores(site.k, site.v, site.valid, self.n_sink, self.lag_size, self.across))
