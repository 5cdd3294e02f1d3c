"""TRIM-KV: trained gates say at birth how fast a token is forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError, PolicyWeightsError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.published import Published, Shape
    from kvrewrite.policies.site import Site

GATES = ("rg", "rg2", "rg3")
PARTS = {  # a gate's tensors: the ones that make its hidden layer, and the one after it
    "rg": (("linear1.weight", "linear1.bias"), "linear2.weight"),
    "rg2": (("linear1.weight", "linear1.bias"), "linear2.weight"),
    "rg3": (("gate_proj.weight", "up_proj.weight"), "down_proj.weight"),
}


@register
@dataclass(frozen=True, kw_only=True)
class TrimKV(Policy):
    """TRIM-KV (Bui et al., "Cache What Lasts", arXiv 2512.03324; code ngocbh/trimkv @ 0456bc4): retention gates.

    log beta = logsigmoid(W2 act(W1 x + b1) + b), one per (token, kv head). x is the attention layer's input
    (retention_gate="rg"), or what it caches of the token, [k | v] of all kv heads with k rotated ("rg2"; "rg3" has
    W2 (act(Wg x) * Wu x) + b). Behind t tokens the one at position j (from 0) is worth (t + 1 - j) log beta_j: what is left of
    it, in logs. As soon as a head holds budget + buffer_size slots, its `budget` best stay; original positions. Attention itself
    is the model's own: its decay by beta belongs to training.

    buffer_size=128 as the Qwen3 models have it (the others 1). A whole prompt goes through at once and is cut down after it,
    as in the authors' code; `chunk` does so after each chunk. The released code's other strategies (key norms, budgets
    shared by heads or layers) are left out. log beta is computed in fp32 from a logit in the model's dtype.
    """

    name = "trim_kv"
    summary = "what trained gates forget slowest"
    source = "arXiv 2512.03324"
    evicts_when = "when M + buffer slots are held"
    needs_weights = True
    published = "trimkv_weights.pth or its directory"
    published_as = ("trimkv_weights.pth",)

    budget: int | float | None = 512
    buffer_size: int = 128
    retention_gate: str = "auto"
    hidden_size: int = 512
    activation: str = "auto"

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        if self.buffer_size < 1:
            raise OptionError(f"trim_kv: buffer_size is {self.buffer_size}, expected at least 1")
        if self.hidden_size < 1:
            raise OptionError(f"trim_kv: hidden_size is {self.hidden_size}, expected at least 1")
        if self.retention_gate not in ("auto", *GATES):
            raise OptionError(
                f"trim_kv: retention_gate is {self.retention_gate!r}, expected one of auto, {', '.join(GATES)}"
            )
        for option in ("layer_budgets", "head_budgets"):
            if getattr(self, option) != "equal":
                raise OptionError(
                    f"trim_kv: {option} is {getattr(self, option)!r}, but it cuts all heads of all layers down at the same "
                    "token; expected equal"
                )
        super().validate()

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Takes the model's activation, and the gates' kind and width from the weights."""
        changes: dict[str, Any] = {}
        if self.activation == "auto":
            changes["activation"] = facts.get("activation") or "silu"
        gate = self.retention_gate
        tensors, metadata = facts.get("policy_tensors") or {}, facts.get("policy_metadata") or {}
        first = next((t for n, t in tensors.items() if n.endswith(("linear1.weight", "gate_proj.weight"))), None)
        if first is not None and first.dim() == 2:
            changes["hidden_size"] = int(first.shape[0])
        if gate == "auto":
            gate = metadata.get("retention_gate", "auto")
        if gate == "auto":
            gate = self._kind(sites, tensors, first)
        if gate not in GATES:
            raise PolicyWeightsError(
                f"trim_kv: the weights' metadata says retention_gate={gate!r}, expected one of {', '.join(GATES)}"
            )
        if gate != "rg" and self.positions != "original":
            raise OptionError(
                f"trim_kv: positions is {self.positions}, but {gate} gates read rotated keys at the positions that they were "
                "trained with; expected positions=original"
            )
        return dataclasses.replace(self, retention_gate=gate, **changes)

    @staticmethod
    def _kind(sites: list[AttentionSite], tensors: dict[str, Any], first: Any) -> str:
        """Which kind of gates these weights are."""
        if any(n.endswith("gate_proj.weight") for n in tensors):
            return "rg3"
        owner = next((s for s in sites if s.shares_kv_with is None), None)
        if first is None or first.dim() != 2 or owner is None:
            return "rg"
        cached = owner.kv_heads * (owner.head_dim + owner.v_head_dim)
        if first.shape[1] == cached:
            raise OptionError(
                f"trim_kv: these gates read {cached} channels, as many as the keys and values of a token have: are they rg2, or "
                "rg on as many hidden channels? The config.json beside the weights says so (retention_gate), and import-weights "
                "takes it from there; or give -o retention_gate=rg or rg2"
            )
        return "rg"

    @staticmethod
    def _names(site: Site) -> Callable[[str], str]:
        """The authors' key layout."""
        return f"model.layers.{site.layer}.self_attn.retention_gate.{{}}".format

    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The gate of a layer."""
        name, (inner, other), outer = self._names(site), *PARTS.get(self.retention_gate, PARTS["rg"])
        width = (self.hidden_size, int(self._source(site).shape[-1]))
        return {
            name(inner): width,
            name(other): width if self.retention_gate == "rg3" else width[:1],
            name(outer): (site.kv_heads, self.hidden_size),
            name("bias"): (site.kv_heads,),
        }

    @classmethod
    def read_published(cls, file: Published) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The retention_gate part of a state_dict; the config.json beside it names the kind."""
        tensors, config = file.tensors(), file.config()
        layers = file.by_layer(tensors, r"model\.layers\.(\d+)\.self_attn\.retention_gate\.(.+)")
        told = config.get("retention_gate")
        if told is not None and told not in GATES:
            raise file.error(f"config.json says retention_gate={told!r}, expected one of {', '.join(GATES)}")
        kind = told or ("rg3" if "gate_proj.weight" in layers[0] else "rg")
        (inner, other), outer = PARTS[kind]
        wide: Shape = ("hidden", "input")
        expected: dict[str, Shape] = {inner: wide, other: wide if kind == "rg3" else ("hidden",)}
        sizes = file.sizes(layers, {**expected, outer: ("kv heads", "hidden"), "bias": ("kv heads",)})
        file.agree_with_config({"num_hidden_layers": len(layers), "num_key_value_heads": sizes["kv heads"]})
        heads, hidden = str(sizes["kv heads"]), str(sizes["hidden"])
        metadata = {"layers": str(len(layers)), "kv_heads": heads, "hidden_size": hidden}
        if told or kind == "rg3":  # rg and rg2 have the same names
            metadata["retention_gate"] = kind
        for key in ("memory_size", "buffer_size"):  # what the gates were trained for
            if isinstance(config.get(key), int):
                metadata[f"trained_{key}"] = str(config[key])
        if isinstance(config.get("base_model"), str):
            metadata["trained_for"] = config["base_model"]
        return tensors, metadata

    def _source(self, site: Site) -> Tensor:
        """What the gates read, (B, T, channels)."""
        if self.retention_gate not in ("rg2", "rg3"):
            return site.hidden_states
        return site.cached_channels().transpose(1, 2).flatten(2)

    def score(self, site: Site) -> Scores:
        """log beta is stored; this eviction goes by what time has made of it."""
        name, x, (inner, other), outer = self._names(site), self._source(site), *PARTS[self.retention_gate]
        if self.retention_gate == "rg3":
            wide = site.activation(site.linear(x, name(inner)), self.activation) * site.linear(x, name(other))
        else:
            wide = site.activation(site.linear(x, name(inner), name(other)), self.activation)
        logit = site.per_head(site.linear(wide, name(outer), name("bias")))
        new = -site.softplus(-logit)
        following = site.positions[:, 0] + site.valid + 1
        age = site.per_row(following) - site.slot_positions()
        return Scores(new, select=site.join(site.stored_scores(), new) * age.float())

    # -- runtime
    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Chunk by chunk, cut down where the buffer is full."""
        step = self.chunk or max(1, length)
        budget, held, segments = self.slots(row.seen + length), row.held, []
        for at in range(0, length, step):
            held += min(step, length - at)
            full = held >= budget + self.buffer_size
            segments.append(Segment(min(step, length - at), budget if full else UNLIMITED))
            held = min(held, budget) if full else held
        return self.protecting(segments, row)

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """Cut down when the buffer is full."""
        budget = self.slots(row.seen + 1)
        full = self.decode_eviction and row.held + 1 >= budget + self.buffer_size
        return self.protecting([Segment(1, budget if full else UNLIMITED, prompt=False)], row)[0]
