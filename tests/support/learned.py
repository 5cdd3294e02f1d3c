"""Trained heads of others: random ones with the names and shapes that their files have, and what they keep, in fp64.

The rules are for tests/support/oracle.py and read from the authors' texts and definitions: one number at a time where that is
possible. The model of the tests has `LAYERS` layers, `HIDDEN` channels, `HEADS` query heads and `KV_HEADS` kv heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.oracle import Entry, Layer, Moment, Rule, pieces
from tests.support.oracle_rules import Scored, Scores, best, fraction

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 3, 64, 4, 2, 16
WIDTH = 12  # of hidden layers
RANK, SINKS = 6, 5  # of Fast KVzip's gates


# -- files -------------------------------------------------------------------------------------------------------------
def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


@functools.cache
def kvzap_file(linear: bool = False, layers: int = LAYERS) -> dict[str, Tensor]:
    """model.safetensors of KVzapModel: nn.Linear, or nn.Sequential(Linear, GELU, Linear), in a list called layers."""
    g, found = torch.Generator().manual_seed(11), {}
    for i in range(layers):
        if linear:
            found[f"layers.{i}.weight"] = _normal(g, KV_HEADS, HIDDEN, scale=0.3)
            found[f"layers.{i}.bias"] = _normal(g, KV_HEADS, scale=0.3) - 1
            continue
        found[f"layers.{i}.0.weight"] = _normal(g, WIDTH, HIDDEN, scale=0.3)
        found[f"layers.{i}.0.bias"] = _normal(g, WIDTH, scale=0.3)
        found[f"layers.{i}.2.weight"] = _normal(g, KV_HEADS, WIDTH, scale=0.5)
        found[f"layers.{i}.2.bias"] = _normal(g, KV_HEADS, scale=0.3) - 1
    return found


@functools.cache
def fast_kvzip_file(layers: int = LAYERS) -> list[dict[str, Tensor]]:
    """The list under "module" in the authors' .pt."""
    g, found = torch.Generator().manual_seed(12), []
    for _ in range(layers):
        found.append(
            {
                "q_proj.weight": _normal(g, HEADS * RANK, HIDDEN),
                "q_proj.bias": _normal(g, HEADS * RANK),
                "k_proj.weight": _normal(g, KV_HEADS * RANK, HIDDEN),
                "q_norm.weight": 1 + _normal(g, RANK, scale=0.3),
                "k_norm.weight": 1 + _normal(g, RANK, scale=0.3),
                "k_base": _normal(g, KV_HEADS, 1, SINKS, RANK),
                "b": _normal(g, KV_HEADS, 1, HEADS // KV_HEADS),
            }
        )
    return found


def fast_kvzip_weights() -> dict[str, Tensor]:
    """The same as policy weights."""
    return {f"gates.{i}.{n}": t for i, gate in enumerate(fast_kvzip_file()) for n, t in gate.items()}


@functools.cache
def trim_kv_file(kind: str = "rg", layers: int = LAYERS) -> dict[str, Tensor]:
    """trimkv_weights.pth: the model's state_dict under retention_gate."""
    g, found = torch.Generator().manual_seed(13), {}
    width = HIDDEN if kind == "rg" else 2 * KV_HEADS * HEAD_DIM
    for i in range(layers):
        gate = f"model.layers.{i}.self_attn.retention_gate."
        if kind == "rg3":
            found[gate + "gate_proj.weight"] = _normal(g, WIDTH, width, scale=0.3)
            found[gate + "up_proj.weight"] = _normal(g, WIDTH, width, scale=0.3)
            found[gate + "down_proj.weight"] = _normal(g, KV_HEADS, WIDTH)
        else:
            found[gate + "linear1.weight"] = _normal(g, WIDTH, width, scale=0.3)
            found[gate + "linear1.bias"] = _normal(g, WIDTH, scale=0.3)
            found[gate + "linear2.weight"] = _normal(g, KV_HEADS, WIDTH)
        found[gate + "bias"] = 3 + _normal(g, KV_HEADS, scale=0.3)
    return found


ALPHA = [[0.6, 0.0], [1.3, 0.0], [0.25, 0.97]]  # full_attention_heads.tsv


# -- rules -------------------------------------------------------------------------------------------------------------
def best_of_all(layers: list[Layer], slots: int, safe: Callable[[list[Entry]], list[bool]]) -> list[list[list[Entry]]]:
    """layer -> kv head -> what stays where all heads of all layers share `slots` for each; safe: of a head's entries."""
    everything = []
    for layer in layers:
        for h, entries in enumerate(layer.heads):
            everything += [
                (-math.inf if s else -e.score, layer.index, h, e.position) for s, e in zip(safe(entries), entries)
            ]
    stays = {place[1:] for place in sorted(everything)[: slots * sum(len(layer.heads) for layer in layers)]}
    return [
        [[e for e in entries if (layer.index, h, e.position) in stays] for h, entries in enumerate(layer.heads)]
        for layer in layers
    ]


@dataclass(kw_only=True)
class KVzapRule(Rule):
    """Behind the window stays what scores the threshold; of that at most the budget."""

    models: dict[str, Tensor]
    threshold: float | None
    window: int
    budget: int | float | None = None
    chunk: int | None = None
    decode_eviction: bool = True
    contiguous: bool = False
    scope: str = "head"

    def cut(self, length: int) -> list[tuple[int, str]]:
        return [(n, "prompt") for n in pieces(length, self.chunk)]

    def arrive(self, layer: Layer, count: int) -> None:
        def linear(x: Tensor, name: str) -> Tensor:
            name = f"layers.{layer.index}.{name}"
            return self.models[f"{name}weight"].double() @ x + self.models[f"{name}bias"].double()

        for t, x in enumerate(layer.inputs[len(layer.inputs) - count :]):
            if f"layers.{layer.index}.weight" in self.models:
                scores = linear(x, "")
            else:
                wide = linear(x, "0.")
                scores = linear(wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))), "2.")
            for h, entries in enumerate(layer.heads):
                entries[len(entries) - count + t].score = float(scores[h])

    def keep_all(self, layers: list[Layer], moment: Moment) -> list[list[list[Entry]]]:
        if self.scope != "model" or (moment.part == "decode" and not self.decode_eviction):
            return super().keep_all(layers, moment)
        assert self.budget is not None
        return best_of_all(
            layers, fraction(self.budget, moment.total, self.window), lambda e: self.safe(e, self.window)
        )

    def safe(self, entries: list[Entry], recent: int) -> list[bool]:
        """The newest."""
        return [n >= len(entries) - recent for n in range(len(entries))]

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        if moment.part == "decode" and not self.decode_eviction:
            return layer.heads
        recent = range(moment.seen - self.window, moment.seen)
        out = []
        for entries in layer.heads:
            if self.threshold is not None:
                entries = [e for e in entries if e.position in recent or e.score >= self.threshold]
            if self.budget is not None:
                slots = fraction(self.budget, moment.total, self.window)
                safe = [e.position in recent for e in entries]
                entries = best(entries, [e.score for e in entries], slots, safe)
            out.append(entries)
        return out


@dataclass(kw_only=True)
class FastKVzipRule(Scored):
    """The first tokens, a window, and what gates rate highest: of all heads of all layers, of a layer's heads, of a head."""

    gates: list[dict[str, Tensor]]
    sinks: int = 4
    scope: str = "model"
    wide: int = 4096  # window of prompts beyond a chunk
    ratio: float = 0.02
    interval: int = 128
    decode_window: int = 8
    head_floor: float = 0.0

    def arrive(self, layer: Layer, count: int) -> None:
        gate = {n: t.double() for n, t in self.gates[layer.index].items()}

        def normalized(x: Tensor, weight: Tensor) -> Tensor:
            return x / torch.sqrt((x * x).sum() / len(x) + 1e-6) * weight

        for t, x in enumerate(layer.inputs[len(layer.inputs) - count :]):
            for h, entries in enumerate(layer.heads):
                group = layer.group(h)
                k = normalized(gate["k_proj.weight"][h * RANK : (h + 1) * RANK] @ x, gate["k_norm.weight"])
                total = 0.0
                for r, g in enumerate(group):
                    rows = slice(g * RANK, (g + 1) * RANK)
                    q = normalized(gate["q_proj.weight"][rows] @ x + gate["q_proj.bias"][rows], gate["q_norm.weight"])
                    own = float(q @ k) / RANK**0.5 + float(gate["b"][h, 0, r])
                    rivals = [float(q @ s) / RANK**0.5 for s in gate["k_base"][h, 0]]
                    # The token's share of a softmax over itself and the sinks.
                    total += math.exp(own) / (math.exp(own) + sum(math.exp(rival) for rival in rivals))
                entries[len(entries) - count + t].score = total / len(group)

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[e.score for e in entries] for entries in layer.heads]

    def slots(self, layer: Layer, moment: Moment) -> tuple[int, int]:
        slots = fraction(self.budget, moment.total, self.sinks)
        if moment.part == "decode":
            return slots, self.decode_window
        short = self.chunk is None or moment.prompt < self.chunk
        window = int(self.ratio * moment.prompt) if short else self.wide
        return slots, min(window, max(0, slots - self.sinks))

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        slots, recent = self.slots(layer, moment)
        each = [slots] * len(layer.heads)
        if self.scope == "layer":
            safe = [self.safe(entries, recent) for entries in layer.heads]
            each = self.per_head(layer, moment, slots, self.scores(layer, moment), safe)
        out = []
        for entries, n in zip(layer.heads, each):  # a head with less room than the window has keeps the newest of it
            first = sum(e.position < self.sinks for e in entries)
            safe_now = self.safe(entries, min(recent, max(0, n - first)))
            out.append(best(entries, [e.score for e in entries], n, safe_now))
        return out

    def keep_all(self, layers: list[Layer], moment: Moment) -> list[list[list[Entry]]]:
        if moment.part == "decode" and (not self.interval or (moment.seen - 1) % self.interval):
            return [layer.heads for layer in layers]
        if self.scope != "model":
            return [self.keep(layer, moment) for layer in layers]
        slots, recent = self.slots(layers[0], moment)
        return best_of_all(layers, slots, lambda entries: self.safe(entries, recent))


@dataclass(kw_only=True)
class TrimKVRule(Scored):
    """A full buffer is cut down to what the gates' decay has left most of."""

    gates: dict[str, Tensor]
    kind: str = "rg"
    buffer: int = 1

    def arrive(self, layer: Layer, count: int) -> None:
        prefix = f"model.layers.{layer.index}.self_attn.retention_gate."
        w = {n.removeprefix(prefix): t.double() for n, t in self.gates.items() if n.startswith(prefix)}
        for t in range(count):
            new = [entries[len(entries) - count + t] for entries in layer.heads]
            x = layer.inputs[len(layer.inputs) - count + t]
            if self.kind != "rg":
                x = torch.cat([torch.cat([layer.rotated(e), e.value]) for e in new])
            if self.kind == "rg3":
                wide = w["gate_proj.weight"] @ x
                logits = w["down_proj.weight"] @ (wide * torch.sigmoid(wide) * (w["up_proj.weight"] @ x)) + w["bias"]
            else:
                wide = w["linear1.weight"] @ x + w["linear1.bias"]
                logits = w["linear2.weight"] @ (wide * torch.sigmoid(wide)) + w["bias"]
            for e, logit in zip(new, logits.tolist()):
                e.score = -math.log1p(math.exp(-logit))

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[e.score * (moment.seen + 1 - e.position) for e in entries] for entries in layer.heads]

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        slots, _ = self.slots(layer, moment)
        if layer.longest < slots + self.buffer:
            return layer.heads
        return super().keep(layer, moment)


@dataclass(kw_only=True)
class DuoRule(Rule):
    """Retrieval heads keep everything; the others `start` first and `recent` last tokens."""

    retrieval: list[list[bool]]
    start: int
    recent: int
    chunk: int | None = None

    def cut(self, length: int) -> list[tuple[int, str]]:
        return [(n, "prompt") for n in pieces(length, self.chunk)]

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        return [
            [e for e in entries if full or e.position < self.start or e.position >= moment.seen - self.recent]
            for full, entries in zip(self.retrieval[layer.index], layer.heads)
        ]
