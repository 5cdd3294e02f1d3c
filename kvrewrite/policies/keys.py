"""Policies that look at keys alone: Knorm and KeyDiff."""

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
class Knorm(Policy):
    """Keys of small norm stay: score_j = -||k_j|| (Devoto et al., arXiv 2406.11430, section 3), per kv head, in prefill and
    in decoding."""

    name = "knorm"
    summary = "keys of small norm"
    source = "arXiv 2406.11430"
    evicts_when = "prompt or chunks, decoding"

    budget: int | float | None = 2048

    def validate(self) -> None:
        """A budget is needed."""
        self.require_budget()
        super().validate()

    def score(self, site: Site) -> Scores:
        """Minus the norm."""
        return Scores(-site.k.float().norm(dim=-1))


@register
@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keys unlike the others stay (Park et al., arXiv 2504.15364, section 3): score_j = -cos(k_j, mean of k_i / ||k_i||) over
    all keys of a head that are there, rotated, renewed at every chunk and every generated token.

    chunk=128 as in the paper's block-wise prefill. recent_tokens: a protected window (an option of the paper, 0 as there).
    """

    name = "keydiff"
    summary = "keys unlike the other keys"
    source = "arXiv 2504.15364"
    evicts_when = "chunks, decoding"

    budget: int | float | None = 2048
    chunk: int | None = 128
    recent_tokens: int = 0

    @property
    def recent(self) -> int:
        """The protected window."""
        return self.recent_tokens

    def validate(self) -> None:
        """A budget above the window."""
        self.require_budget()
        if self.recent_tokens < 0:
            raise OptionError(f"keydiff: recent_tokens is {self.recent_tokens}, expected 0 or more")
        super().validate()

    def score(self, site: Site) -> Scores:
        """All keys are compared anew."""
        cached, new = site.split(site.ops.key_difference(site.keys(), site.slot_positions()))
        return Scores(new, slots=cached)
