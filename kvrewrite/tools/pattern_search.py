"""Chooses a pattern of sparse prefill for each query head of a model: MInference's offline search.

A text runs through the model with dense attention. At each site every kind of pattern, with several first numbers, is
made as large as a given share of dense attention's work allows (arXiv 2407.02490, algorithm 1: the same work in the
kernel for all candidates), and a head takes the one whose output is nearest to dense attention's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvrewrite.capture.frontend import capture
from kvrewrite.capture.third_party import unwrap
from kvrewrite.errors import InputError, OptionError
from kvrewrite.ir.fx import is_op, placeholder
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels import limits
from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.attention.patterns import DENSE, DENSE_TOKENS, HeadPattern
from kvrewrite.kernels.attention.sparse_index import Sums, computed_share, find_visible, last_sums
from kvrewrite.kernels.groups import At, Logits, Placed, Slots, Tokens, VisibleBlocks
from kvrewrite.ops.dispatch import fused
from kvrewrite.passes.insert.sparse_prefill import why_not
from kvrewrite.passes.pipeline import canonical

attention = torch.ops.kvrewrite.attention.default
Progress = Callable[[str, int, int], None]
# Kinds and their first numbers; the last number is what the search makes as large as the share allows.
CANDIDATES: tuple[tuple[str, int], ...] = (
    *(("vertical_slash", columns) for columns in (30, 100, 500, 1000, 3000)),
    *(("a_shape", first) for first in (64, 1024)),
    ("block_sparse", 0),
)


@dataclass
class Found:
    """What the search found. patterns, errors, shares: by layer, for each query head: its pattern, the relative error of
    its output (L2, over all tokens) and its share of dense attention's work."""

    patterns: dict[int, tuple[HeadPattern, ...]] = field(default_factory=dict)
    errors: dict[int, list[float]] = field(default_factory=dict)
    shares: dict[int, list[float]] = field(default_factory=dict)


def search_patterns(
    model: nn.Module, ids: Tensor, share: float = 0.1, progress: Progress = lambda what, done, of: None
) -> Found:
    """Patterns for a causal LM of transformers or any module that `transform` takes. ids (B, T): texts of the length that
    the patterns are for. Layers with a window or a chunk get none. Raises what `transform` raises for the model."""
    if not 0 < share < 1:
        raise OptionError(f"share is {share}, expected a part of dense attention's work between 0 and 1")
    if ids.dim() != 2 or ids.shape[1] <= DENSE_TOKENS:
        raise InputError(f"ids are of shape {tuple(ids.shape)}, expected rows of more than {DENSE_TOKENS} tokens")
    captured = capture(unwrap(model))
    sites = canonical(captured, check="off")
    run = _Searching(captured.graph, sites, share, progress)
    given = {"input_ids": ids}
    if placeholder(captured.graph, "position_ids") is not None:
        given["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.no_grad():
        run.run(*(given[str(n.target)] for n in captured.graph.graph.nodes if n.op == "placeholder"))
    return run.found


class _Searching(fx.Interpreter):
    """Runs a canonical graph and searches at each attention."""

    def __init__(self, gm: fx.GraphModule, sites: list[AttentionSite], share: float, progress: Progress):
        super().__init__(gm)
        self.found, self.progress, self.share = Found(), progress, share
        nodes = (n for n in gm.graph.nodes if is_op(n, attention))
        self.sites = dict(zip(nodes, sites, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node; at attention, searches and gives what dense attention gives."""
        site = self.sites.get(n)
        if site is None:
            return super().run_node(n)
        self.progress("layers", site.layer, len(self.sites))
        args, _ = self.fetch_args_kwargs_from_env(n)
        q, k, v, sinks, alibi, *shape = args
        if why_not(site) or site.alibi:
            return attention(*args)
        one = _Site(Tokens(q, k, v), Logits(sinks, alibi, None, *shape))
        patterns, errors, shares = one.search(self.share)
        self.found.patterns[site.layer] = patterns
        self.found.errors[site.layer], self.found.shares[site.layer] = errors, shares
        return one.exact


class _Site:
    """The attention of a whole text at one site."""

    def __init__(self, tokens: Tokens, logits: Logits):
        self.tokens, self.logits = Tokens(*(x.contiguous() for x in tokens)), logits
        q, k, v = self.tokens
        (b, h, t, d), hkv, device = q.shape, k.shape[1], q.device
        none = torch.zeros(b, hkv, dtype=torch.int32, device=device)
        self.slots = Slots(k.new_zeros(b, hkv, 0, d), v.new_zeros(b, hkv, 0, v.shape[3]), none)
        self.at = At(torch.arange(t, device=device).expand(b, t), torch.full((b,), t, dtype=torch.int32, device=device))
        self.heads = h
        why = limits.why_not(d, v.shape[3], h // hkv, t, False, 8 * q.itemsize)
        self.fused = fused("search_patterns", q, why)
        self.sums = self._last_sums()
        self.exact = self.attend(self.visible([DENSE] * h))
        self.size = self.exact.double().square().sum((0, 2, 3)).sqrt().clamp(min=1e-30)

    def _last_sums(self) -> Sums:
        """The same for all candidates."""
        if not self.fused:
            return last_sums(self.tokens, self.slots, self.at, self.logits)
        from kvrewrite.kernels.attention.sparse_sums import last_sums as kernel

        return kernel(self.tokens.q, self.tokens.k, self.slots.lens, self.at, self.logits)

    def visible(self, heads: Sequence[HeadPattern]) -> VisibleBlocks:
        text = ",".join(map(str, heads))
        return find_visible(text, self.tokens, self.slots, self.at, self.logits, lambda *_: self.sums)

    def attend(self, visible: VisibleBlocks) -> Tensor:
        q, k, v = self.tokens
        if self.fused:
            from kvrewrite.kernels.attention.sparse_chunk import attend_visible

            return attend_visible(q, k, v, visible, self.slots.lens, self.at, self.logits)[0]
        places = self.at.positions[:, None].expand(k.shape[:3])
        placed = Placed(self.at.positions, places, torch.ones_like(places, dtype=torch.bool))
        return reference.attend(self.tokens, placed, self.logits, own=True, visible=visible)[0]

    def shares(self, heads: Sequence[HeadPattern]) -> Tensor:
        """Each head's part of dense attention's work: (H,), on the CPU."""
        return computed_share(self.visible(heads), self.tokens, self.slots, self.at).mean(0).cpu()

    def fitted(self, kind: str, first: int, share: float) -> tuple[list[HeadPattern], Tensor]:
        """Each head's largest pattern of a kind within the share, the smallest where none is, and their shares."""

        def patterns(numbers: Iterable[int]) -> list[HeadPattern]:
            return [HeadPattern(kind, first, n) if first else HeadPattern(kind, n) for n in map(int, numbers)]

        low = torch.ones(self.heads, dtype=torch.int64)
        high = torch.full_like(low, self.tokens.q.shape[2] + 1)
        while bool((high - low > 1).any()):
            middle = (low + high) // 2
            fits = (self.shares(patterns(middle.tolist())) <= share) & (middle > low)
            low, high = torch.where(fits, middle, low), torch.where(fits | (middle == low), high, middle)
        chosen = patterns(low.tolist())
        return chosen, self.shares(chosen)

    def search(self, share: float) -> tuple[tuple[HeadPattern, ...], list[float], list[float]]:
        """Each head's pattern, its error and its share."""
        best: list[tuple[tuple[float, float], HeadPattern, float, float]] = []
        for kind, first in CANDIDATES:
            if first >= self.tokens.q.shape[2]:
                continue
            heads, work = self.fitted(kind, first, share)
            off = (self.attend(self.visible(heads)).double() - self.exact.double()).square().sum((0, 2, 3)).sqrt()
            for h, error in enumerate((off / self.size).tolist()):
                # Within the share the smallest error counts, beyond it the least work.
                own = float(work[h])
                rank = (0.0, error) if own <= share else (own, error)
                entry = (rank, heads[h], error, own)
                if h == len(best):
                    best.append(entry)
                elif rank < best[h][0]:
                    best[h] = entry
        return tuple(b[1] for b in best), [round(b[2], 6) for b in best], [round(b[3], 4) for b in best]


# ------------------------------------------------------------------------------------------------------------------ texts
def read_ids(tokenizer: Any, paths: Sequence[str | Path], tokens: int) -> Tensor:
    """The first tokens of the texts of files, one after the other: (1, T), T at most `tokens`. Of .jsonl files all texts
    of each object count. Raises OptionError."""
    found: list[int] = []
    for path in map(Path, paths):
        try:
            text = path.read_text()
            if path.suffix in (".jsonl", ".json"):
                text = "\n\n".join("\n".join(_texts(json.loads(line))) for line in text.splitlines() if line.strip())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise OptionError(
                f"{path} can't be read: {error}; expected a text, or .jsonl with an object per line"
            ) from None
        found += tokenizer(text, add_special_tokens=not found)["input_ids"]
        if len(found) >= tokens:
            break
    if len(found) <= DENSE_TOKENS:
        raise OptionError(f"the texts have {len(found)} tokens; expected more than {DENSE_TOKENS}, best {tokens}")
    return torch.tensor([found[:tokens]])


def _texts(value: Any) -> list[str]:
    """All texts in a piece of JSON, in order."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _texts(item)]
