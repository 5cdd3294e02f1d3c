"""DuoAttention: retrieval heads keep everything, streaming heads the first tokens and a recent window."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError, PolicyWeightsError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import UNLIMITED

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.published import Published
    from kvrewrite.policies.site import Site

PATTERN = "full_attention_heads"  # the name of the one tensor, (layers, kv heads)


@register
@dataclass(frozen=True, kw_only=True)
class DuoAttention(Policy):
    """DuoAttention (Xiao et al., arXiv 2410.10819; code and patterns mit-han-lab/duo-attention @ fe93c31).

    A pattern holds one number alpha per (layer, kv head), trained. Of all heads the share `sparsity` with the smallest alpha
    are streaming heads: they keep the first `start` tokens and the newest of their `budget` slots, as StreamingLLM does with
    original positions; the others keep every token. start=64 and 256 recent tokens are what the authors deploy (patterns
    are trained with 128 and 256).

    alpha is clamped to [0, 1]; equal ones are told apart by layer and head (the authors add random noise). `heads` is the
    result, a group of digits a layer, 1 for heads that keep everything ("1010,0110"): given as an option, it needs no
    weights. A chunk attends to what its heads hold and to itself, as in the authors' chunked prefill; they take the whole
    prompt as one chunk unless told otherwise.
    """

    name = "duo_attention"
    summary = "everything in retrieval heads, the first tokens and a recent window in the others"
    source = "arXiv 2410.10819"
    evicts_when = "chunks, decoding"
    needs_weights = True
    weights_are_options = True
    published = "full_attention_heads.tsv or its directory"
    published_as = ("full_attention_heads.tsv",)
    has_scores = False
    head_pattern = True

    budget: int | float | None = 320
    start: int = 64
    sparsity: float = 0.5
    heads: str = ""
    chunk: int | None = 4096

    @property
    def sinks(self) -> int:
        """The first tokens, which never go."""
        return self.start

    def validate(self) -> None:
        """Sizes that make sense, and a pattern that is one."""
        self.require_budget()
        if self.start < 0:
            raise OptionError(f"duo_attention: start is {self.start}, expected 0 or more")
        if not 0 <= self.sparsity <= 1:
            raise OptionError(
                f"duo_attention: sparsity is {self.sparsity}, expected a share of the heads between 0 and 1"
            )
        if self.heads and not all(group and set(group) <= {"0", "1"} for group in self.heads.split(",")):
            raise OptionError(
                f"duo_attention: heads is {self.heads[:80]!r}, expected a group of 0 and 1 for each layer, such as 1010,0110"
            )
        super().validate()

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """The pattern as it fits the model."""
        tensors = facts.get("policy_tensors") or {}
        heads = self.heads
        if tensors and not heads:
            heads = self._classify(tensors)
        if not heads:
            raise OptionError(
                "duo_attention needs a pattern: policy weights (kvrewrite import-weights full_attention_heads.tsv --policy "
                "duo_attention --out pattern.safetensors), or the option heads"
            )
        groups, owners = heads.split(","), [s for s in sites if s.shares_kv_with is None]
        if [len(g) for g in groups] != [s.kv_heads for s in owners]:
            raise PolicyWeightsError(
                f"duo_attention: the pattern has {len(groups)} layers of {_counts(len(g) for g in groups)} heads, but the model "
                f"has {len(owners)} layers of {_counts(s.kv_heads for s in owners)} kv heads; it is another model's"
            )
        return dataclasses.replace(self, heads=heads)

    def of_rank(self, rank: int, ranks: int) -> Policy:
        """The pattern of a rank's own heads."""
        super().of_rank(rank, ranks)
        blocks = [(group, len(group) // ranks) for group in self.heads.split(",")]
        return dataclasses.replace(self, heads=",".join(g[rank * n : (rank + 1) * n] for g, n in blocks))

    def _classify(self, tensors: dict[str, Any]) -> str:
        """Which heads keep everything."""
        pattern = tensors.get(PATTERN)
        if set(tensors) != {PATTERN} or pattern is None or pattern.dim() != 2 or not pattern.is_floating_point():
            got = ", ".join(f"{n} {list(t.shape)}" for n, t in list(tensors.items())[:4])
            raise PolicyWeightsError(
                f"duo_attention: the weights are {got}; expected {PATTERN} (layers, kv heads) alone"
            )
        rows = pattern.double().clamp(0, 1).tolist()
        flat = [alpha for row in rows for alpha in row]
        if any(math.isnan(a) for a in flat):
            raise PolicyWeightsError(f"duo_attention: {PATTERN} has values that are not a number; expected 0 to 1")
        # So many lie below the quantile that the authors compare with (numpy's, by interpolation).
        streaming = len(flat) if self.sparsity == 1 else math.ceil(self.sparsity * (len(flat) - 1) - 1e-9)
        order = sorted(range(len(flat)), key=lambda n: flat[n])
        small = set(order[:streaming])
        width = len(rows[0])
        digits = ["0" if n in small else "1" for n in range(len(flat))]
        return ",".join("".join(digits[at : at + width]) for at in range(0, len(flat), width))

    @classmethod
    def read_published(cls, file: Published) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A line per layer, a number per kv head; the config.json beside it has the training settings."""
        import torch

        try:
            rows = [[float(x) for x in line.split()] for line in file.text().splitlines() if line.strip()]
        except ValueError as error:
            raise file.error(f"not a table of numbers: {error}") from error
        if not rows or len({len(row) for row in rows}) != 1:
            got = ", ".join(str(n) for n in sorted({len(row) for row in rows})) or "no"
            raise file.error(f"lines of {got} numbers; expected a line per layer, each with a number per kv head")
        pattern = torch.tensor(rows, dtype=torch.float32)
        if not bool(pattern.isfinite().all()):
            raise file.error("numbers that are not finite")
        config, metadata = file.config(), {"layers": str(len(rows)), "kv_heads": str(len(rows[0]))}
        for key, name in (("sink_size", "trained_sink_size"), ("recent_size", "trained_recent_size")):
            if isinstance(config.get(key), int):
                metadata[name] = str(config[key])
        if isinstance(config.get("model_name"), str):
            metadata["trained_for"] = config["model_name"]
        return {PATTERN: pattern}, metadata

    def score(self, site: Site) -> Scores:
        """A token is worth its position: the oldest goes first."""
        return Scores(site.position_scores())

    def head_keeps(self, keep: int, layer: int, heads: int) -> list[int]:
        """No limit for heads that keep everything."""
        groups = self.heads.split(",") if self.heads else []
        if layer >= len(groups) or len(groups[layer]) != heads:
            return [UNLIMITED] * heads  # before `adapt` nothing is known of the model
        return [UNLIMITED if digit == "1" else keep for digit in groups[layer]]


def _counts(numbers: Any) -> str:
    """Numbers, each once."""
    return "/".join(str(n) for n in sorted(set(numbers)))
