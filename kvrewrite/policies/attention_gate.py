"""Attention-Gate: trained gates flag tokens before attention, per kv head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class AttentionGate(Policy):
    """Attention-Gate (Zeng et al., arXiv 2410.12876): a small attention per layer looks at the layer's input and flags
    tokens to drop, per head, before the layer's own attention. An AG-style re-implementation: the paper's equations were
    not available, so the form below is ours, as are its defaults.

    p = sigmoid(W_o concat_h(softmax(q_h k_h^T / sqrt(gate_dim), causal) v_h) + b), one per (token, kv head), with q, k, v
    = W x of the attention layer's input x; a token is dropped where p <= threshold: no other token of that head sees it, and it
    never enters the cache. Causal, so prefill, chunks and turns agree; the gate's own keys and values of all tokens stay.
    Prompts only: generated tokens stay, and so do the first `start` tokens. How many slots remain depends on the text;
    a budget (ours, off) caps it, by the largest p.
    """

    name = "attention_gate"
    summary = "what trained gates let pass, per head"
    source = "arXiv 2410.12876"
    evicts_when = "prompts, before attention"
    needs_weights = True
    gates = True
    inputs = ("gated",)
    scores_per_head = False  # the gates decide how much a head keeps

    chunk: int | None = 1024
    start: int = 4
    threshold: float = 0.5
    gate_heads: int | None = None
    gate_dim: int | None = None
    decode_eviction: bool = False

    @property
    def sinks(self) -> int:
        """The first tokens."""
        return self.start

    def validate(self) -> None:
        """A probability."""
        if not 0 < self.threshold < 1:
            raise OptionError(f"attention_gate: threshold is {self.threshold}, expected a probability between 0 and 1")
        if self.start < 0:
            raise OptionError(f"attention_gate: start is {self.start}, expected 0 or more")
        for option in ("gate_heads", "gate_dim"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(
                    f"attention_gate: {option} is {value}, expected at least 1 (None takes it from the weights)"
                )
        super().validate()

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Takes the gate's sizes from the weights' metadata or shapes."""
        tensors, metadata = facts.get("policy_tensors") or {}, facts.get("policy_metadata") or {}
        widths = {int(t.shape[0]) for n, t in tensors.items() if n.endswith("gate.q_proj.weight") and t.dim() == 2}
        width = widths.pop() if len(widths) == 1 else 0
        told = {name: int(metadata[name]) for name in ("gate_heads", "gate_dim") if metadata.get(name, "").isdigit()}
        heads, dim = self.gate_heads, self.gate_dim
        heads = heads or told.get("gate_heads", 0) or (width // dim if dim else 0)
        dim = dim or told.get("gate_dim", 0) or (width // heads if heads else 0)
        if not heads or not dim:
            raise OptionError(
                "attention_gate: the gates' heads and their size are not known; give -o gate_heads=N (and gate_dim=N), or "
                "weights whose metadata say gate_heads"
            )
        if width and heads * dim != width:
            raise OptionError(
                f"attention_gate: gate_heads is {heads} and gate_dim {dim}, but the weights are {width} channels "
                "wide; expected their product"
            )
        return dataclasses.replace(self, gate_heads=heads, gate_dim=dim)

    @staticmethod
    def weight_name(site: Site | AttentionSite, part: str) -> str:
        """Our own key layout."""
        return f"model.layers.{site.layer}.gate.{part}"

    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """A gate's projections of the layer's input, and what comes after its attention."""
        width, hidden = (self.gate_heads or 0) * (self.gate_dim or 0), int(site.hidden_states.shape[-1])
        shapes: dict[str, tuple[int, ...]] = {f"{part}_proj.weight": (width, hidden) for part in "qkv"}
        shapes |= {"o_proj.weight": (site.kv_heads, width), "o_proj.bias": (site.kv_heads,)}
        return {self.weight_name(site, part): shape for part, shape in shapes.items()}

    def projections(self, site: Site) -> tuple[Tensor, ...]:
        """The gate's queries, keys and values of the new tokens, (B, T, width) each."""
        x = site.hidden_states
        return tuple(site.linear(x, self.weight_name(site, f"{part}_proj.weight")) for part in "qkv")

    def probability(self, site: Site, attended: Tensor) -> Tensor:
        """p of the new tokens, (B, Hkv, T) fp32. attended: what the gate's attention gives, (B, T, width) fp32."""
        weight, bias = (site.weight(self.weight_name(site, f"o_proj.{part}")).float() for part in ("weight", "bias"))
        return site.per_head((site.linear_of(attended, weight, bias)).sigmoid())

    def gate(self, site: Site) -> Tensor:
        """The flags, for prompts only."""
        q, k, v = self.projections(site)
        kept = [site.state(f"gate_{p}_{site.layer}", (q.shape[-1],), site.k.dtype, per_token=True) for p in "kv"]
        p = self.probability(site, site.ops.gate(q, k, v, *kept, site.positions, site.valid, self.gate_heads))
        site.remember("p", p)
        # The first tokens stay, and so does everything while decoding.
        may = (site.positions >= self.start) & (site.input("gated") > 0).unsqueeze(1)
        return (p <= self.threshold) & may.unsqueeze(1)

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Every token of a prompt passes a gate."""
        return [dataclasses.replace(s, values={"gated": 1}) for s in super().plan(length, row)]

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """Generated tokens stay."""
        keep = self.slots(row.seen + 1) if self.decode_eviction else UNLIMITED
        return Segment(1, keep, prompt=False)

    def score(self, site: Site) -> Scores:
        """The probability to stay, for where there is a budget, too."""
        return Scores(site.recall("p"))
