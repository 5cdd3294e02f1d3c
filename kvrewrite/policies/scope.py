"""Who shares a budget: all heads of the model, the heads of a layer, or nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.segments import UNLIMITED

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import Site


@dataclass(frozen=True, kw_only=True)
class Scoped(Policy):
    """A policy whose heads share a budget as `scope` says.

    scope="model": the best budget x heads x layers slots stay, wherever they lie; "layer": the heads of a layer share budget
    x heads; "head": each has its own. The first n_sink tokens stay. Layers with a sliding window are not judged: they keep
    their window.
    """

    scope: str = "model"
    n_sink: int = 4
    head_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.scope == "layer" and self.head_budgets == "equal":
            object.__setattr__(self, "head_budgets", "adakv")
        super().__post_init__()

    @property
    def sinks(self) -> int:
        """The first tokens."""
        return self.n_sink

    @property
    def data_dependent(self) -> bool:
        """Where layers share."""
        return self.shares_layers

    @property
    def shares_layers(self) -> bool:
        """All layers, one budget."""
        return self.scope == "model"

    def validate(self) -> None:
        """A scope that goes with the other budgets."""
        if self.scope not in ("model", "layer", "head"):
            raise OptionError(f'{self.name}: scope is {self.scope!r}, expected "model", "layer" or "head"')
        if self.n_sink < 0:
            raise OptionError(f"{self.name}: n_sink is {self.n_sink}, expected at least 0")
        if self.scope != "layer" and self.head_budgets != "equal":
            raise OptionError(
                f'{self.name}: head_budgets is {self.head_budgets!r}, but scope="{self.scope}" says who shares a budget; '
                'expected equal (scope="layer": the heads of a layer share)'
            )
        if self.scope == "model" and self.layer_budgets != "equal":
            raise OptionError(
                f'{self.name}: layer_budgets is {self.layer_budgets!r}, but with scope="model" layers compete; expected equal, '
                'or scope="layer" or "head"'
            )
        if self.scope == "model" and self.merge:
            raise OptionError(f'{self.name}: merge=True needs scope="layer" or "head"')
        super().validate()

    @staticmethod
    def judges(site: AttentionSite) -> bool:
        """Whether a site's slots are judged."""
        return site.shares_kv_with is None and not site.window and not site.chunk

    def worth(self, site: Site) -> tuple[Scores, Tensor]:
        """The scores of a site that is judged, and where its slots stand (B, Hkv, N), -1 for those that can't stay."""
        raise TypeError(f"{type(self).__name__} has no worth(site); define it (docs/develop/add_a_policy.md)")

    def rate(self, site: Site) -> None:
        """Scores and places of all slots of one layer."""
        if not self.judges(site.facts):
            return
        scores, places = self.worth(site)
        cached = site.stored_scores() if scores.slots is None else scores.slots
        everything = (site.join(cached, scores.new), places, site.keep)
        site.remember("rated", (scores.new, everything, () if scores.slots is None else (scores.slots,)))

    def score(self, site: Site) -> Scores:
        """The scores; where layers share, how many slots each head has won."""
        if not self.judges(site.facts):  # keeps its window
            return Scores(site.position_scores(), keep=site.keep.new_full(site.keep.shape, UNLIMITED))
        if not self.shares_layers:
            return self.worth(site)[0]
        layers = [s.layer for s in site.every if self.judges(s)]

        def share() -> list[Tensor]:
            scores, places, keep = zip(*(site.recall("rated", layer)[1] for layer in layers))
            return site.ops.share_layers(scores, places, keep, site.recent, self.n_sink)

        won = site.once("won", share)
        new, _, slots = site.recall("rated")
        return Scores(new, slots=slots[0] if slots else None, keep=won[layers.index(site.layer)])
