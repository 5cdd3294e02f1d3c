"""Expected attention: how much future queries, taken as Gaussian, will attend to a key."""

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
class ExpectedAttention(Policy):
    """Expected attention (Devoto et al., arXiv 2510.00636, section 3; code NVIDIA/kvpress).

    Queries of the prompt before RoPE (without the first n_sink) have mean mu and covariance Sigma; both are turned by the
    mean rotation of the next n_future positions. z_j = mu . k_j / sqrt(d) + k_j^T Sigma k_j / 2d; score_j = (mean over the
    group of softmax_j(z) + epsilon) * ||v_j||. The first n_sink tokens stay. Evicts once, at a row's first prompt; it needs
    no question. The paper weighs by ||W_O v||; ||v|| is what the authors' code does.
    """

    name = "expected_attention"
    summary = "attention expected from Gaussian future queries"
    source = "arXiv 2510.00636"
    evicts_when = "first prompt"
    whole_prompt = True

    budget: int | float | None = 2048
    n_sink: int = 4
    n_future: int = 512
    epsilon: float = 0.0

    @property
    def sinks(self) -> int:
        """The first tokens."""
        return self.n_sink

    @property
    def needs_rotary(self) -> bool:
        """The mean rotation."""
        return True

    @property
    def rotary_ahead(self) -> int:
        """Tables of cos and sin reach to the last future position."""
        return self.n_future

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        for option, least in (("n_sink", 0), ("n_future", 1), ("epsilon", 0)):
            if getattr(self, option) < least:
                raise OptionError(f"expected_attention: {option} is {getattr(self, option)}, expected at least {least}")
        super().validate()

    def score(self, site: Site) -> Scores:
        """What the Gaussian gives, for the new tokens; only a first prompt is ever evicted from."""
        scores = site.ops.expected_attention(
            site.query_before_rope,
            site.k,
            site.v,
            *site.rotary,
            site.valid,
            site.scale,
            self.n_sink,
            self.n_future,
            float(self.epsilon),
        )
        return Scores(scores)
