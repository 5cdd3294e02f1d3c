"""SnapKV and its relatives: what the end of the prompt attends to, smoothed over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.budgets import pyramid
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import Segment

if TYPE_CHECKING:
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """SnapKV (Li et al., arXiv 2404.14469, section 4; code FasterDecoding/SnapKV).

    score_j = pool(sum over the last `window` queries of their softmax weight on j), for j before the window, summed
    over the query heads of a group; the window itself is kept. Evicts once, at a row's first prompt; later prompts and
    generated tokens are only added. window, kernel and pooling are the defaults of the authors' configuration; their class
    has window 64. They keep a set per query head after repeating keys; one per kv head is what saves memory with GQA.
    """

    name = "snapkv"
    summary = "what the prompt's last queries attend to, pooled"
    source = "arXiv 2404.14469"
    evicts_when = "first prompt"
    whole_prompt = True
    needs_question = True
    latent_scores = True

    budget: int | float | None = 2048
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    @property
    def recent(self) -> int:
        """The window of queries stays."""
        return self.window

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        if self.window < 1:
            raise OptionError(f"{self.name}: window is {self.window}, expected at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"{self.name}: kernel is {self.kernel}, expected an odd number (tokens to both sides)")
        if self.pooling not in ("avg", "max"):
            raise OptionError(f'{self.name}: pooling is {self.pooling!r}, expected "avg" or "max"')
        super().validate()

    def score(self, site: Site) -> Scores:
        """The window's attention, pooled. Only a first prompt is ever evicted from, so cached slots have no score."""
        _, new = site.split(site.observe(site.newest_rows(self.window), newest=self.window))
        return Scores(site.ops.pool_window(new, site.valid, self.window, self.kernel, self.pooling == "max"))


@register
@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """PyramidKV (Cai et al., arXiv 2406.02069; code Zefan-Cai/KVCache-Factory): SnapKV's scores, and budgets that fall from
    the first layer to the last.

    With b = budget - window: from 2b - b // beta (at most what is there) in equal steps to b // beta, plus the window.
    Prompts of fewer than 2b tokens have equal budgets. Defaults as the authors' LongBench runs have them.
    """

    name = "pyramidkv"
    summary = "as snapkv, with budgets that fall from layer to layer"
    source = "arXiv 2406.02069"

    window: int = 8
    kernel: int = 7
    pooling: str = "max"
    beta: int = 20

    @property
    def uniform_layers(self) -> bool:
        """Budgets fall from layer to layer."""
        return False

    def validate(self) -> None:
        """The layers' budgets are this policy's own."""
        if self.beta < 1:
            raise OptionError(f"pyramidkv: beta is {self.beta}, expected at least 1")
        if self.layer_budgets != "equal":
            raise OptionError(
                f"pyramidkv: layer_budgets is {self.layer_budgets!r}, but pyramidkv sets the layers' budgets itself; use snapkv"
            )
        super().validate()

    def layer_keeps(self, segment: Segment, tokens: int, layers: int) -> list[int]:
        """The pyramid."""
        keep = segment.keep
        if keep >= tokens:
            return [keep] * layers
        return pyramid(keep, self.window, tokens, layers, self.beta)


@register
@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """Ada-KV (Feng et al., arXiv 2407.11550, algorithm 1; code FFY0/AdaKV): SnapKV's scores, and the heads of a layer share
    their budget by them. The same on other policies: head_budgets=adakv. Defaults as the authors' runs have them.
    """

    name = "adakv"
    summary = "as snapkv, with budgets that the heads compete for"
    source = "arXiv 2407.11550"
    latent_scores = False  # heads compete

    kernel: int = 7
    pooling: str = "max"
    head_budgets: str = "adakv"
