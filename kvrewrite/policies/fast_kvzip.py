"""Fast KVzip: gates that were trained on KVzip's scores; all heads of all layers share one budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError, UnsupportedModelError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.scope import Scoped
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.published import Published
    from kvrewrite.policies.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class FastKVzip(Scoped):
    """Fast KVzip (Kim et al., arXiv 2601.17668; code Janghyun1230/FastKVzip @ 7d78b34, and FastKVzipPress in NVIDIA/kvpress).

    A gate per layer reads the attention layer's input x. Per kv head, and per query head of its group: q = RMSNorm(Wq x + bq),
    k = RMSNorm(Wk x), of `rank` channels each; l = q . k / sqrt(rank) + b, l_s = q . s / sqrt(rank) for each of the learned
    sink keys s; score = mean over the group of 1 / (1 + sum_s exp(l_s - l)), between 0 and 1. The first n_sink tokens and a
    window of the newest count as 1. scope as in `Scoped`.

    The window of a prompt is `window` tokens, or window_ratio of a prompt that fits one chunk, and at most what the budget
    leaves beside the sinks. While decoding, the same every `interval` tokens of the text with the decode_window newest (the
    authors' code for reasoning; interval=0 never, as in their code for long prompts). Layers with a sliding window have no
    gates and keep their window, as in the authors' Gemma 3.

    What differs: their chunks are judged one by one, each keeping its share for good; here a chunk competes with all that is
    held. They protect the system prompt, kvpress the first 4 tokens; so do we. Weights are in the model's dtype. scope="model"
    holds the new keys and values of a chunk in all layers until the last layer is through.
    """

    name = "fast_kvzip"
    summary = "what trained gates rate highest, over all heads of all layers"
    source = "arXiv 2601.17668"
    evicts_when = "chunks, every 128 tokens"
    needs_weights = True
    protects_prompts = False
    published = "a .pt file of Fast KVzip's gates, such as qwen3-8b/q4_dim16_sink16.pt"

    budget: int | float | None = 0.3
    chunk: int | None = 16000
    window: int = 4096
    window_ratio: float = 0.02
    interval: int = 128
    decode_window: int = 8
    rank: int = 16
    gate_sinks: int = 16

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        for option, least in (
            ("window", 0),
            ("interval", 0),
            ("decode_window", 0),
            ("rank", 1),
            ("gate_sinks", 1),
        ):
            if getattr(self, option) < least:
                raise OptionError(f"fast_kvzip: {option} is {getattr(self, option)}, expected at least {least}")
        if not 0 <= self.window_ratio <= 1:
            raise OptionError(f"fast_kvzip: window_ratio is {self.window_ratio}, expected a share between 0 and 1")
        if isinstance(self.budget, int) and self.interval and self.budget <= self.n_sink + self.decode_window:
            raise OptionError(
                f"fast_kvzip: budget is {self.budget}, but {self.n_sink} first tokens and the {self.decode_window} newest always "
                f"stay while decoding; expected more than {self.n_sink + self.decode_window}"
            )
        super().validate()

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Takes the gates' sizes from the weights."""
        tensors = facts.get("policy_tensors") or {}
        base = next((t for n, t in tensors.items() if n.endswith(".k_base")), None)
        if not any(self.judges(s) for s in sites):
            raise UnsupportedModelError(
                "fast_kvzip: every layer of this model has a sliding window, and gates belong to the others"
            )
        if base is None or base.dim() != 4:
            return self
        return dataclasses.replace(self, rank=int(base.shape[3]), gate_sinks=int(base.shape[2]))

    def _gate_name(self, site: Site) -> str:
        """gates.<number of the layer among those that have gates>"""
        return f"gates.{[s.layer for s in site.every if self.judges(s)].index(site.layer)}"

    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """gates.<number>.<the authors' names>."""
        if not self.judges(site.facts):
            return {}
        hidden, heads = int(site.hidden_states.shape[-1]), site.kv_heads
        shapes = {
            "q_proj.weight": (site.heads * self.rank, hidden),
            "q_proj.bias": (site.heads * self.rank,),
            "k_proj.weight": (heads * self.rank, hidden),
            "q_norm.weight": (self.rank,),
            "k_norm.weight": (self.rank,),
            "k_base": (heads, 1, self.gate_sinks, self.rank),
            "b": (heads, 1, site.heads // heads),
        }
        return {f"{self._gate_name(site)}.{name}": shape for name, shape in shapes.items()}

    @classmethod
    def read_published(cls, file: Published) -> tuple[dict[str, Tensor], dict[str, str]]:
        """{"module": [state_dict of each gate], and records of the training, some of them numpy arrays}."""
        layers = file.state_dicts("module", "gates", numpy_types())
        sizes = file.sizes(
            layers,
            {
                "q_norm.weight": ("rank",),
                "k_norm.weight": ("rank",),
                "k_base": ("kv heads", 1, "sinks", "rank"),
                "b": ("kv heads", 1, "group"),
                "q_proj.weight": ("heads*rank", "input"),
                "q_proj.bias": ("heads*rank",),
                "k_proj.weight": ("kv heads*rank", "input"),
            },
        )
        heads, group, rank = sizes["kv heads"], sizes["group"], sizes["rank"]
        for name, rows in (("kv heads*rank", heads * rank), ("heads*rank", heads * group * rank)):
            if sizes[name] != rows:
                raise file.error(f"its projections have {sizes[name]} rows ({name}), expected {rows}")
        tensors = {f"gates.{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.items()}
        known = {"gates": len(layers), "kv_heads": heads, "group": group, "rank": rank, "sinks": sizes["sinks"]}
        return tensors, {name: str(size) for name, size in known.items()}

    def _gate_score(self, site: Site) -> Tensor:
        """The gate's score of the new tokens, (B, Hkv, T)."""
        name, x = self._gate_name(site), site.hidden_states
        q = site.linear(x, f"{name}.q_proj.weight", f"{name}.q_proj.bias")
        k = site.linear(x, f"{name}.k_proj.weight")
        rest = (site.weight(f"{name}.{part}") for part in ("q_norm.weight", "k_norm.weight", "k_base", "b"))
        return site.ops.sink_gate(q, k, *rest)

    def worth(self, site: Site) -> tuple[Scores, Tensor]:
        """What the gate says of the new tokens."""
        return Scores(self._gate_score(site)), site.slot_positions()

    # -- runtime
    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Chunks, with the window that the prompt's length asks for."""
        step, keep = self.chunk or max(1, length), self.slots(row.seen + length)
        short = length < (self.chunk or length + 1)
        window = int(self.window_ratio * length) if short else self.window
        window = min(window, max(0, keep - self.n_sink))
        return [Segment(min(step, length - at), keep, window) for at in range(0, length, step)]

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """An eviction every `interval` tokens of the text."""
        if not self.decode_eviction or not self.interval or row.seen % self.interval:
            return Segment(1, UNLIMITED, prompt=False)
        return Segment(1, self.slots(row.seen + 1), self.decode_window, prompt=False)


def numpy_types() -> list[Any]:
    """The types in pickled numpy arrays, which the losses in the authors' files are."""
    import numpy as np
    from numpy._core import multiarray

    rebuild = multiarray._reconstruct  # type: ignore[attr-defined]
    dtypes = [getattr(np.dtypes, n) for n in ("Float64DType", "Float32DType", "Int64DType")]
    # The module had another name before numpy 2.
    return [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, *dtypes]
