"""StreamingLLM: attention sinks and a recent window."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores, rotation_known
from kvrewrite.policies.registry import register

if TYPE_CHECKING:
    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import Site


@dataclass(frozen=True, kw_only=True)
class ContiguousWherePossible(Policy):
    """positions="auto": contiguous where the model's rotation was found, original where there is none."""

    positions: str = "auto"

    def __post_init__(self) -> None:
        if self.positions != "auto":
            super().__post_init__()
        else:
            dataclasses.replace(self, positions="original")

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Settles "auto" as it fits the model."""
        if self.positions != "auto":
            return self
        return dataclasses.replace(self, positions="contiguous" if rotation_known(sites, facts) else "original")


@register
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(ContiguousWherePossible):
    """Keeps the first `start` tokens and the most recent budget - start (Xiao et al., arXiv 2309.17453, section 3.2).

    No scores; the same slots in every layer and head. As in the authors' code keys are cached without their rotation and
    rotated by their place in the cache at every step, so that no position ever exceeds the budget
    (positions="contiguous", the default on models with RoPE); positions="original" keeps true positions, as kvpress does.
    Models without RoPE use original positions.
    """

    name = "streaming_llm"
    summary = "the first tokens and a recent window"
    source = "arXiv 2309.17453"
    evicts_when = "chunks, decoding"
    has_scores = False
    latent_scores = True

    budget: int | float | None = 1024
    start: int = 4
    chunk: int | None = 512

    @property
    def sinks(self) -> int:
        """The first tokens, which never go."""
        return self.start

    def validate(self) -> None:
        """The budget must hold more than the sinks."""
        if self.start < 0:
            raise OptionError(f"streaming_llm: start is {self.start}, expected 0 or more")
        self.require_budget()
        super().validate()

    def score(self, site: Site) -> Scores:
        """A token is worth its position: the oldest goes first."""
        return Scores(site.position_scores())
