"""Q-Filters: keys along the direction that a head's queries have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.policies.published import Published
    from kvrewrite.policies.site import Site

FILTERS = "q_filters"  # the name of the one published tensor, (layers, kv heads, D)


@register
@dataclass(frozen=True, kw_only=True)
class QFilters(Policy):
    """Q-Filters (Godey et al., arXiv 2503.02812, section 3; code NathanGodey/qfilters).

    score_j = -f . k_j, (B, Hkv, T), with k rotated and f (Hkv, D) a filter of the layer: minus the
    first right singular vector of the head's rotated queries, turned so that most queries project
    positively on it, and averaged over a group. So keys with the largest part along the queries' common
    direction stay, and the `window` newest. No attention is needed. A score never changes; prompts,
    chunks and generated tokens evict, as the authors' cache does at every update.

    Filters are computed once for a model, from a few texts; the authors publish them for many models.
    """

    name = "qfilters"
    summary = "keys along the common direction of the queries, and a recent window"
    source = "arXiv 2503.02812"
    evicts_when = "prompt or chunks, decoding"
    needs_weights = True
    published = "the model.safetensors of a _qfilt model, or its directory"
    published_as = ("model.safetensors",)

    budget: int | float | None = 1024
    window: int = 64

    @property
    def recent(self) -> int:
        """The newest tokens."""
        return self.window

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        if self.window < 0:
            raise OptionError(f"qfilters: window is {self.window}, expected 0 or more")
        super().validate()

    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """A filter per kv head."""
        return {f"{FILTERS}.{site.layer}": (site.kv_heads, site.facts.head_dim)}

    @classmethod
    def read_published(cls, file: Published) -> tuple[dict[str, Tensor], dict[str, str]]:
        """One tensor for all layers."""
        tensors = file.tensors()
        found = tensors.get(FILTERS)
        if set(tensors) != {FILTERS} or found is None or found.dim() != 3 or not found.is_floating_point():
            got = ", ".join(f"{n} {list(t.shape)}" for n, t in list(tensors.items())[:4])
            raise file.error(f"it has {got or 'nothing'}; expected {FILTERS} (layers, kv heads, head dim) alone")
        if not bool(found.isfinite().all()):
            raise file.error(f"{FILTERS} has numbers that are not finite")
        layers, heads, size = found.shape
        file.agree_with_config({"num_layers": layers, "num_kv_heads": heads, "kv_head_dim": size})
        parts = {f"{FILTERS}.{i}": part.contiguous() for i, part in enumerate(found)}
        return parts, {"layers": str(layers), "kv_heads": str(heads), "head_dim": str(size)}

    def score(self, site: Site) -> Scores:
        """Minus the product with the filter."""
        filters = site.weight(f"{FILTERS}.{site.layer}").float().unsqueeze(0).unsqueeze(2)
        return Scores(-(site.k.float() * filters).sum(dim=-1))
