"""KVzap: a small model of the hidden states predicts what KVzip would say, and a threshold decides."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.scope import Scoped
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment
from kvrewrite.policies.weights import first_kept

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.published import Published, Shape
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class KVzap(Scoped):
    """KVzap (NVIDIA, arXiv 2601.07891; code NVIDIA/kvpress @ 8bb29b9: KVzapPress in DMSPress).

    score = W x + b (linear models) or W2 gelu(W1 x + b1) + b2 (MLP models) of the attention layer's input x, one per (token,
    kv head): an estimate of the log of what KVzip+ finds a token worth. Once a token is no longer among the `window`
    newest, it goes where score < threshold; so heads keep as much as the text asks for, in prompts and while decoding. A
    budget (off) caps it, by the largest scores; threshold=None with a budget is top-k alone (ours: scores then only rank), of
    each head, of a layer's heads or of all heads of all layers (scope as in `Scoped`; "layer" is head_budgets=adakv).

    The first n_sink tokens stay: none of them in the authors' code; weights of ours that were trained without labels of the first
    tokens (`kvrewrite train`) say of how many, and at least so many do. Without these the model's attention sinks would go.

    threshold=-4 is the example of the authors' README; their results are for a range of thresholds. A whole prompt goes
    through at once, as theirs does; `chunk` drops between chunks. decode_eviction=False is DMSPress(decoding=False). While
    decoding, pages of dropped slots go back every 64 tokens.
    """

    name = "kvzap"
    summary = "what a small trained model scores above a threshold, per head"
    source = "arXiv 2601.07891"
    evicts_when = "prompts, decoding"
    needs_weights = True
    published = "the model.safetensors of a KVzap model, or its directory"
    published_as = ("model.safetensors", "pytorch_model.bin")
    inputs = ("drops",)

    scope: str = "head"
    n_sink: int = 0
    head_floor: float = 0.2
    threshold: float | None = -4.0
    window: int = 128
    hidden_size: int = 512

    def __post_init__(self) -> None:
        if self.head_budgets == "adakv" and self.scope == "head":
            object.__setattr__(self, "scope", "layer")
        super().__post_init__()

    @property
    def recent(self) -> int:
        """The window, where a budget caps."""
        return self.window

    @property
    def data_dependent(self) -> bool:
        """With a threshold, and where layers share."""
        return self.threshold is not None or self.shares_layers

    def validate(self) -> None:
        """A threshold or a budget."""
        if self.threshold is None:
            self.require_budget()
        elif not math.isfinite(self.threshold):
            raise OptionError(f"kvzap: threshold is {self.threshold}, expected a finite number (a log)")
        if self.window < 0 or self.hidden_size < 0:
            raise OptionError(
                f"kvzap: window is {self.window} and hidden_size {self.hidden_size}, expected 0 or more (hidden_size=0: a "
                "linear model)"
            )
        if self.threshold is not None and self.scope != "head":
            raise OptionError(
                f"kvzap: scope is {self.scope!r} and head_budgets {self.head_budgets!r}, but the threshold decides how much a "
                'head keeps; expected scope="head" and head_budgets="equal", or threshold=None'
            )
        super().validate()

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Takes the kind of model, and its width, from the weights, and how many first tokens they know nothing about."""
        tensors, first = facts.get("policy_tensors") or {}, first_kept(facts, self.n_sink)
        inner = next(
            (t for n, t in tensors.items() if re.fullmatch(r"layers\.\d+\.0\.weight", n) and t.dim() == 2), None
        )
        if inner is not None:
            return dataclasses.replace(self, hidden_size=int(inner.shape[0]), n_sink=first)
        return dataclasses.replace(self, hidden_size=0, n_sink=first) if tensors else self

    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The authors' key layout."""
        layer, heads, width = f"layers.{site.layer}", site.kv_heads, int(site.hidden_states.shape[-1])
        if not self.hidden_size:
            return {f"{layer}.weight": (heads, width), f"{layer}.bias": (heads,)}
        first = {f"{layer}.0.weight": (self.hidden_size, width), f"{layer}.0.bias": (self.hidden_size,)}
        return {**first, f"{layer}.2.weight": (heads, self.hidden_size), f"{layer}.2.bias": (heads,)}

    @classmethod
    def read_published(cls, file: Published) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A KVzapModel from save_pretrained: nn.Linear, or Sequential(Linear, GELU, Linear), for every layer."""
        tensors = file.tensors()
        layers = file.by_layer(tensors, r"layers\.(\d+)\.(.+)")
        linear = "weight" in layers[0]
        expected: dict[str, Shape] = {"weight": ("kv heads", "input"), "bias": ("kv heads",)}
        if not linear:
            first: dict[str, Shape] = {"0.weight": ("hidden", "input"), "0.bias": ("hidden",)}
            expected = {**first, "2.weight": ("kv heads", "hidden"), "2.bias": ("kv heads",)}
        sizes = file.sizes(layers, expected)
        facts = {"input_dim": sizes["input"], "output_dim": sizes["kv heads"], "n_modules": len(layers)}
        file.agree_with_config({**facts, "hidden_dim": None if linear else sizes["hidden"]})
        kind = "linear" if linear else "mlp"
        return tensors, {"kind": kind, "layers": str(len(layers)), "kv_heads": str(sizes["kv heads"])}

    def worth(self, site: Site) -> tuple[Scores, Tensor]:
        """The prediction."""
        return Scores(self._predicted(site)), site.slot_positions()

    def _predicted(self, site: Site) -> Tensor:
        x, last = site.hidden_states, f"layers.{site.layer}"
        if self.hidden_size:
            x, last = site.activation(site.linear(x, f"{last}.0.weight", f"{last}.0.bias"), "gelu"), f"{last}.2"
        return site.per_head(site.linear(x, f"{last}.weight", f"{last}.bias"))

    def score(self, site: Site) -> Scores:
        """The prediction, and how many of a head's slots are good enough."""
        if self.shares_layers:
            return super().score(site)
        new = self._predicted(site)
        if self.threshold is None:
            return Scores(new)
        scores, places, drops = site.join(site.stored_scores(), new), site.slot_positions(), site.input("drops")
        if self.sinks:  # they stay, so they count among what does
            import torch

            scores = torch.where((places >= 0) & (places < self.sinks), torch.inf, scores)
        limits = (site.recent, site.keep, drops, float(self.threshold), *site.span)
        return Scores(new, keep=site.ops.kept_above(scores, places, *limits))

    # -- runtime
    def segment(self, length: int, keep: int, **rest: Any) -> Segment:
        """A segment in which what is not good enough goes."""
        return Segment(length, keep, self.window, {"drops": 1}, **rest)

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """What leaves the window is judged, unless decode_eviction is off."""
        if not self.decode_eviction:
            return Segment(1, UNLIMITED, prompt=False)
        return self.segment(1, self.slots(row.seen + 1), prompt=False)
