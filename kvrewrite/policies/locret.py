"""Locret: trained retaining heads score every cache unit; chunked prefill under a fixed budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment
from kvrewrite.policies.weights import first_kept

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.published import Published
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class Locret(Policy):
    """Retaining heads (Huang et al., arXiv 2410.01805, algorithm 1 and table 4; code huangyuxiang03/Locret @ 28995c5).

    score = fc2(act(fc1([q | k | v]))) of the raw projections before RoPE, one number per (token, kv head), without
    biases; act is the model's own activation. Prefill in chunks: after each chunk every head keeps its `budget` best
    slots; the `stabilizers` newest slots are protected except after the last chunk; the `local_tail` last prompt tokens
    are added afterwards and nothing is evicted then, so a prompt leaves at most budget + local_tail slots. Where the budget
    is a fraction of the text, at most half of it are stabilizers. The first n_sink tokens stay: none of them in the authors'
    code; weights that were trained without labels of the first tokens (label=reconstruction) say of how many, and at least
    so many do.

    positions="contiguous" (the authors' code): keys are cached without rotation, re-ranked at each prefill chunk and
    frozen while decoding. decode_eviction=False as the authors have it: the cache grows with the answer; True (ours)
    keeps it within the budget.
    """

    name = "locret"
    summary = "what trained retaining heads score highest"
    source = "arXiv 2410.01805"
    evicts_when = "chunks"
    needs_weights = True
    protects_prompts = False
    published = "the .bin file of Locret's retaining heads"

    budget: int | float | None = 6000
    chunk: int | None = 3072
    stabilizers: int = 2500
    local_tail: int = 100
    n_sink: int = 0
    hidden_size: int = 1024
    activation: str = "auto"
    positions: str = "contiguous"
    decode_eviction: bool = False

    def validate(self) -> None:
        """The stabilizers must leave room for scored slots."""
        if self.budget is None or self.chunk is None:
            raise OptionError(f"locret: budget is {self.budget} and chunk {self.chunk}, expected numbers of tokens")
        for name in ("stabilizers", "local_tail", "n_sink"):
            if getattr(self, name) < 0:
                raise OptionError(f"locret: {name} is {getattr(self, name)}, expected 0 or more")
        if self.hidden_size < 1:
            raise OptionError(f"locret: hidden_size is {self.hidden_size}, expected at least 1")
        if isinstance(self.budget, int) and self.budget <= self.stabilizers:
            raise OptionError(
                f"locret: budget is {self.budget}, but {self.stabilizers} stabilizers are kept after each chunk; expected "
                "a budget above the stabilizers"
            )
        if self.layer_budgets not in ("equal", "pyramid") and min(self.layer_list()) <= self.sinks + self.stabilizers:
            raise OptionError(
                f"{self.name}: layer_budgets has a layer of {min(self.layer_list())} slots, but {self.sinks} first tokens and "
                f"{self.stabilizers} stabilizers are kept after each chunk; expected more in every layer"
            )

    @property
    def sinks(self) -> int:
        """The first tokens."""
        return self.n_sink

    @property
    def renews_ranks_in_decoding(self) -> bool:
        """Ranks are final once the prompt is in the cache."""
        return False

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Takes the model's activation and the width of the given weights."""
        import dataclasses

        changes: dict[str, Any] = {"n_sink": first_kept(facts, self.n_sink)}
        if self.activation == "auto":
            changes["activation"] = facts.get("activation") or "silu"
        tensors = facts.get("policy_tensors") or {}
        sizes = {int(t.shape[0]) for n, t in tensors.items() if n.endswith("fc1.weight") and t.dim() == 2}
        if len(sizes) == 1:
            changes["hidden_size"] = sizes.pop()
        return dataclasses.replace(self, **changes)

    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The authors' key layout."""
        width = int(site.projected.shape[-1])
        return {
            self._name(site, "fc1"): (self.hidden_size, width),
            self._name(site, "fc2"): (site.kv_heads, self.hidden_size),
        }

    @staticmethod
    def _name(site: Site, part: str) -> str:
        return f"model.layers.{site.layer}.self_attn.{part}.weight"

    @classmethod
    def read_published(cls, file: Published) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A state_dict with fc1 and fc2 of every layer (huangyuxiang03/Locret @ 28995c5)."""
        prefix = "model.layers.{}.self_attn."
        layers = file.by_layer(file.tensors(), r"model\.layers\.(\d+)\.self_attn\.(.+)")
        sizes = file.sizes(layers, {"fc1.weight": ("hidden", "q+k+v"), "fc2.weight": ("kv heads", "hidden")})
        tensors = {prefix.format(i) + n: t for i, layer in enumerate(layers) for n, t in layer.items()}
        heads, hidden = str(sizes["kv heads"]), str(sizes["hidden"])
        return tensors, {"layers": str(len(layers)), "kv_heads": heads, "hidden_size": hidden}

    def score(self, site: Site) -> Scores:
        """fc2(act(fc1([q | k | v]))) of the tokens' own projections; a score never changes afterwards."""
        wide = site.activation(site.linear(site.projected, self._name(site, "fc1")), self.activation)
        return Scores(site.per_head(site.linear(wide, self._name(site, "fc2"))))

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Algorithm 1: chunks up to the local tail, then the tail."""
        assert self.chunk is not None
        keep = self.slots(row.seen + length)
        tail = min(self.local_tail, length)
        body = length - tail
        stabilizers = self.stabilizers
        if isinstance(self.budget, float):
            stabilizers = min(stabilizers, (keep - self.sinks) // 2)
        segments = []
        for at in range(0, body, self.chunk):
            size = min(self.chunk, body - at)
            last = at + size == body
            segments.append(Segment(size, keep, 0 if last else stabilizers))
        if tail:
            segments.append(Segment(tail, UNLIMITED))
        return segments


@register
@dataclass(frozen=True, kw_only=True)
class LocretQ(Locret):
    """Locret-Q (section 4.4 of the paper): the question stands before the context, so that every eviction sees it, and
    again at the end. `model.prompt_ids(context, question)` puts a prompt together so. The heads' weights should have been
    trained that way (the paper does not say for how many tokens).

    start: the first tokens, which hold the question, stay (ours: without it the first eviction may take the question away).
    """

    name = "locret_q"
    summary = "as locret, with the question before the context"
    needs_question = True
    question_first = True

    start: int = 64

    @property
    def sinks(self) -> int:
        """The question in front."""
        return self.start

    def validate(self) -> None:
        """Room beside the question."""
        super().validate()
        if self.start < 0 or (isinstance(self.budget, int) and self.budget <= self.start + self.stabilizers):
            raise OptionError(
                f"locret_q: budget is {self.budget}, but {self.start} first tokens and {self.stabilizers} stabilizers stay; "
                f"expected a budget above {self.start + self.stabilizers}"
            )
