"""Attention-Gate: trained gates flag tokens before attention, per kv head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import UNLIMITED, Policy, RowState, Scores, Segment

if TYPE_CHECKING:
    from torch import fx

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import SiteHook


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
    summary = "trained gates flag tokens before attention"
    source = "arXiv 2410.12876"
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
        width, heads, dim = facts.get("gate_width"), self.gate_heads, self.gate_dim
        heads = heads or int(facts.get("gate_heads", 0)) or (width // dim if width and dim else 0)
        dim = dim or int(facts.get("gate_dim", 0)) or (width // heads if width and heads else 0)
        if not heads or not dim:
            raise OptionError(
                "attention_gate: the gates' heads and their size are not known; give -o gate_heads=N (and gate_dim=N), or "
                "weights whose metadata say gate_heads"
            )
        if width and heads * dim != width:
            raise OptionError(
                f"attention_gate: gate_heads is {heads} and gate_dim {dim}, but the weights are {width} channels wide"
            )
        return dataclasses.replace(self, gate_heads=heads, gate_dim=dim)

    @staticmethod
    def _name(site: AttentionSite, part: str) -> str:
        return f"model.layers.{site.layer}.gate.{part}"

    def weights(self, sites: list[AttentionSite], hooks: list[SiteHook]) -> dict[str, tuple[int, ...]]:
        """Our own key layout."""
        shapes: dict[str, tuple[int, ...]] = {}
        width = (self.gate_heads or 0) * (self.gate_dim or 0)
        for site, hook in zip(sites, hooks, strict=True):
            if site.shares_kv_with is not None:
                continue
            hidden = hook.hidden_width()
            for part in ("q_proj", "k_proj", "v_proj"):
                shapes[self._name(site, f"{part}.weight")] = (width, hidden)
            shapes[self._name(site, "o_proj.weight")] = (site.kv_heads, width)
            shapes[self._name(site, "o_proj.bias")] = (site.kv_heads,)
        return shapes

    def probability(self, hook: SiteHook, attend: Callable[[fx.Node, fx.Node, fx.Node], fx.Node]) -> fx.Node:
        """p of the new tokens, (B, Hkv, T) fp32. attend: adds the gate's attention, (B, T, width) each, fp32 out."""
        assert self.gate_heads and self.gate_dim  # `adapt` has found them
        x, site = hook.hidden_states(), hook.site
        out = attend(*(hook.linear(x, hook.weight(self._name(site, f"{p}_proj.weight"))) for p in "qkv"))
        weight = hook.fp32(hook.weight(self._name(site, "o_proj.weight")))
        bias = hook.fp32(hook.weight(self._name(site, "o_proj.bias")))
        return hook.per_head(hook.call(hook.aten.sigmoid.default, hook.linear(out, weight, bias)))

    def gate(self, hook: SiteHook) -> fx.Node:
        """The flags, for prompts only."""
        site, width = hook.site, (self.gate_heads or 0) * (self.gate_dim or 0)

        def attend(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
            dtype = str(hook.dtype).removeprefix("torch.")
            kept = [hook.state(f"gate_{p}_{site.layer}", (width,), dtype, per_token=True) for p in "kv"]
            where = (hook.input("positions"), hook.input("valid"))
            return hook.call(hook.ops.gate.default, q, k, v, *kept, *where, self.gate_heads)

        p = self.probability(hook, attend)
        hook.inputs.memo[f"gate {site.layer}"] = p
        low = hook.call(hook.aten.le.Scalar, p, self.threshold)
        # The first tokens stay, and so does everything while decoding.
        later = hook.call(hook.aten.ge.Scalar, hook.input("positions"), self.start)
        row = hook.call(hook.aten.unsqueeze.default, hook.call(hook.aten.gt.Scalar, hook.input("gated"), 0), 1)
        may = hook.call(hook.aten.unsqueeze.default, hook.call(hook.aten.logical_and.default, later, row), 1)
        return hook.call(hook.aten.logical_and.default, low, may)

    def plan(self, length: int, row: RowState = RowState()) -> list[Segment]:  # noqa: B008 (frozen)
        """Every token of a prompt passes a gate."""
        return [dataclasses.replace(s, values={"gated": 1}) for s in super().plan(length, row)]

    def decode_segment(self, row: RowState = RowState()) -> Segment:  # noqa: B008 (frozen)
        """Generated tokens stay."""
        keep = self.slots(row.seen + 1) if self.decode_eviction else UNLIMITED
        return Segment(1, keep, prompt=False)

    def score(self, hook: SiteHook) -> Scores:
        """The probability to stay, for where there is a budget, too."""
        return Scores(hook.inputs.memo[f"gate {hook.site.layer}"])
