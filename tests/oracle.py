"""A slow and obvious model of eviction: the unmodified Llama of transformers with caches that are Python lists.

One row at a time. Keys are kept without their rotation; this file has its own RoPE, its own attention (fp64) and its
own reading of each policy, taken from the papers' texts and not from kvrewrite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "kvrewrite_tests_oracle"


@dataclass
class Entry:
    """One token in the cache of one kv head."""

    key: Tensor
    value: Tensor
    position: int  # in the text
    place: int  # what its key is rotated by
    score: float = 0.0


class Rule:
    """How a policy cuts a prompt and what it keeps. This one keeps everything, at original positions."""

    contiguous = False
    accumulates = False  # a score is the attention received so far

    def cut(self, length: int) -> list[tuple[int, str]]:
        """Lengths of the parts of a prompt, each with a word that `keep` understands."""
        return [(length, "prompt")]

    def keep(self, entries: list[Entry], part: str) -> list[Entry]:
        """What stays after a part, in order; part is "decode" after a generated token."""
        return entries

    def renews(self, part: str, after: str) -> bool:
        """Contiguous: whether the cache is re-ranked 0..n-1 before this part; `after` is the part before."""
        return True


def pieces(length: int, size: int | None) -> list[int]:
    """length = size + size + ... + rest."""
    size = size or length
    return [min(size, length - at) for at in range(0, length, size)]


@dataclass
class StreamingRule(Rule):
    """The first `start` tokens and the last budget - start; keys re-ranked at every step, or left where they were."""

    budget: int
    start: int
    chunk: int | None
    contiguous: bool = True

    def cut(self, length: int) -> list[tuple[int, str]]:
        return [(n, "prompt") for n in pieces(length, self.chunk)]

    def keep(self, entries: list[Entry], part: str) -> list[Entry]:
        if len(entries) <= self.budget:
            return entries
        return entries[: self.start] + entries[len(entries) - (self.budget - self.start) :]


@dataclass
class H2ORule(Rule):
    """Half of the budget for the newest, half for those that received most attention since they came."""

    budget: int
    chunk: int | None
    contiguous: bool = False
    recent: int | None = None
    accumulates: bool = True

    def cut(self, length: int) -> list[tuple[int, str]]:
        return [(n, "prompt") for n in pieces(length, self.chunk)]

    def keep(self, entries: list[Entry], part: str) -> list[Entry]:
        if len(entries) <= self.budget:
            return entries
        recent = self.budget // 2 if self.recent is None else self.recent
        older, newest = entries[: len(entries) - recent], entries[len(entries) - recent :]
        heavy = sorted(older, key=lambda e: e.score, reverse=True)[: self.budget - recent]
        return sorted(heavy, key=lambda e: e.position) + newest


@dataclass
class LocretRule(Rule):
    """Algorithm 1 of Locret; heads: per layer (fc1, fc2) of the retaining heads."""

    budget: int
    chunk: int
    stabilizers: int
    local_tail: int
    decode_eviction: bool = False
    contiguous: bool = True
    heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def cut(self, length: int) -> list[tuple[int, str]]:
        tail = min(self.local_tail, length)
        body = pieces(length - tail, self.chunk) if length > tail else []
        parts = [(n, "chunk") for n in body[:-1]] + [(n, "last chunk") for n in body[-1:]]
        return parts + ([(tail, "tail")] if tail else [])

    def keep(self, entries: list[Entry], part: str) -> list[Entry]:
        if part == "tail" or (part == "decode" and not self.decode_eviction):
            return entries
        worth = [e.score for e in entries]
        if part == "chunk":
            for i in range(max(0, len(entries) - self.stabilizers), len(entries)):
                worth[i] = math.inf
        best = sorted(range(len(entries)), key=lambda i: worth[i], reverse=True)[: self.budget]
        return [entries[i] for i in sorted(best)]

    def renews(self, part: str, after: str) -> bool:
        # The authors re-rank at every forward. Without eviction in decoding nothing changes then; with it (ours) the
        # ranks that the prompt ended with stay.
        return part != "decode" or after != "decode"


def rotate(x: Tensor, places: list[int], theta: float) -> Tensor:
    """RoPE of vectors (N, d), channel i paired with channel i + d / 2."""
    half = x.shape[1] // 2
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.tensor(places, dtype=torch.float64)[:, None] * frequency
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)


class Oracle:
    """One request of one row. `prompt` and `decode` return the logits of the tokens given, (T, vocabulary)."""

    def __init__(self, model: nn.Module, rule: Rule):
        self.model, self.rule = model, rule
        self.config: Any = model.config
        assert self.config.rope_parameters["rope_type"] == "default"
        self.theta = float(self.config.rope_parameters["rope_theta"])
        layers, kv_heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        self.cache: list[list[list[Entry]]] = [[[] for _ in range(kv_heads)] for _ in range(layers)]
        self.seen = 0
        self.part = self.after = ""
        self.raw: dict[tuple[int, str], Tensor] = {}
        self.places: dict[tuple[int, int], int] = {}  # of the next token, by layer and head

    def prompt(self, ids: list[int]) -> Tensor:
        """One call with several tokens, cut as the policy does."""
        out, at = [], 0
        for length, part in self.rule.cut(len(ids)):
            out.append(self._part(ids[at : at + length], part))
            at += length
        assert at == len(ids)
        return torch.cat(out)

    def decode(self, token: int) -> Tensor:
        """One generated token."""
        return self._part([token], "decode")

    def kept(self) -> dict[int, list[list[int]]]:
        """layer -> kv head -> positions that are kept."""
        return {i: [[e.position for e in head] for head in heads] for i, heads in enumerate(self.cache)}

    # -- inside
    def _part(self, ids: list[int], part: str) -> Tensor:
        self.part = part
        attention, hooks = self.config._attn_implementation, []
        for i, layer in enumerate(self.model.model.layers):  # type: ignore[union-attr, arg-type]
            for name in ("q_proj", "k_proj", "v_proj"):
                hooks.append(getattr(layer.self_attn, name).register_forward_hook(self._remember(i, name)))
        AttentionInterface.register(ATTENTION, self._attention)
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
        self.config._attn_implementation = ATTENTION
        try:
            with torch.no_grad():
                # At position 0 the model's own rotation is the identity.
                zeros = torch.zeros(1, len(ids), dtype=torch.long)
                logits = self.model(torch.tensor([ids]), position_ids=zeros, use_cache=False).logits[0]
        finally:
            self.config._attn_implementation = attention
            AttentionInterface._global_mapping.pop(ATTENTION)
            AttentionMaskInterface._global_mapping.pop(ATTENTION)
            for hook in hooks:
                hook.remove()
        self.seen += len(ids)
        self.after = part
        return logits

    def _remember(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.raw[layer, name] = output[0].double()

        return hook

    def _scores(self, layer: int, count: int, kv_heads: int) -> Tensor:
        """Scores of new tokens by retaining heads: (T, kv heads)."""
        if not isinstance(self.rule, LocretRule):
            return torch.zeros(count, kv_heads)
        fc1, fc2 = (w.double() for w in self.rule.heads[layer])
        x = torch.cat([self.raw[layer, n] for n in ("q_proj", "k_proj", "v_proj")], dim=-1)
        hidden = x @ fc1.T
        return (hidden * torch.sigmoid(hidden)) @ fc2.T

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        _, heads, count, _ = query.shape
        kv_heads = key.shape[1]
        scores = self._scores(layer, count, kv_heads)
        out = torch.zeros(count, heads, value.shape[-1], dtype=torch.float64)
        for h in range(kv_heads):
            entries = self.cache[layer][h]
            if self.rule.contiguous and self.rule.renews(self.part, self.after):
                for rank, entry in enumerate(entries):
                    entry.place = rank
            following = self._following(layer, h)
            old = len(entries)
            for t in range(count):
                k, v = key[0, h, t].double(), value[0, h, t].double()
                entries.append(Entry(k, v, self.seen + t, following + t, float(scores[t, h])))
            self.places[layer, h] = following + count
            keys = rotate(torch.stack([e.key for e in entries]), [e.place for e in entries], self.theta)
            values = torch.stack([e.value for e in entries])
            for g in range(h * heads // kv_heads, (h + 1) * heads // kv_heads):
                queries = rotate(query[0, g].double(), [following + t for t in range(count)], self.theta)
                for t in range(count):
                    visible = old + t + 1
                    weights = torch.softmax(keys[:visible] @ queries[t] * scaling, dim=0)
                    out[t, g] = weights @ values[:visible]
                    if self.rule.accumulates:
                        for entry, weight in zip(entries, weights.tolist()):
                            entry.score += weight
            self.cache[layer][h] = self.rule.keep(entries, self.part)
        return out.to(query.dtype)[None], None

    def _following(self, layer: int, head: int) -> int:
        """What the next token is rotated by. With frozen ranks it follows the last one, even where that is gone."""
        if not self.rule.contiguous:
            return self.seen
        if self.rule.renews(self.part, self.after):
            return len(self.cache[layer][head])
        return self.places[layer, head]
