"""CriticalKV: attention first, then attention times what the value does to the layer's output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site

CHOSEN = 1e30  # above any other score


@register
@dataclass(frozen=True, kw_only=True)
class CriticalKV(SnapKV):
    """CriticalKV (Feng et al., arXiv 2502.03805; code NVIDIA/kvpress: CriticalKVPress over SnapKVPress, which is also in the
    authors' FFY0/DefensiveKV).

    Evicting a token changes a head's output by at most its attention times ||W_h v||_1, W_h the head's part of the output
    projection, once the tokens with the most attention are kept. So of `budget` slots the first floor(first_stage *
    budget) go by SnapKV's a_j (the mean over the window's queries and a group's heads, pooled; the window itself comes
    first), the others by (a_j + epsilon) * ||W_h v_j||_1, the norm averaged over a group's heads. Evicts once, at a row's
    first prompt. Needs attention that goes straight into a plain linear layer.
    """

    name = "criticalkv"
    summary = "as snapkv; half of the slots by what a value does to the layer's output"
    source = "arXiv 2502.03805"
    latent_scores = False
    scores_per_head = False  # the first stage counts slots of each head

    first_stage: float = 0.5
    epsilon: float = 1e-4

    def validate(self) -> None:
        """A share, and a number."""
        if not 0 <= self.first_stage <= 1:
            raise OptionError(f"criticalkv: first_stage is {self.first_stage}, expected a share between 0 and 1")
        if not 0 <= self.epsilon < math.inf:
            raise OptionError(f"criticalkv: epsilon is {self.epsilon}, expected a number of 0 or more")
        super().validate()

    def score(self, site: Site) -> Scores:
        """Two stages of a first prompt."""
        import torch

        attention = super().score(site).new / (self.window * (site.heads // site.kv_heads))
        index = torch.arange(attention.shape[2], device=attention.device)
        inside = index < site.valid.unsqueeze(1)
        window = index >= (site.valid - self.window).unsqueeze(1)
        by_attention = attention.masked_fill(window.unsqueeze(1), math.inf)
        place = site.ops.ranks(by_attention, site.all_heads(inside))
        first = (site.keep.double() * self.first_stage).floor().unsqueeze(2)
        worth = (attention + self.epsilon) * site.output_norms()
        worth = torch.where(site.all_heads(inside), worth, 0.0)  # padding may be anything
        return Scores(worth.masked_fill(place < first, CHOSEN))
