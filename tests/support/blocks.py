"""InfLLM for tests/support/oracle.py, from its paper (arXiv 2402.04617, section 3.2), a number at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.oracle import Entry, Layer, Moment, Rule, pieces, rotate


@dataclass(kw_only=True)
class InfLLMRule(Rule):
    """A window of at least `budget - block` tokens, the first ones, and the blocks that queries find by representatives.

    constant: all that is away is seen at one distance, that of the window; otherwise where it was.
    """

    budget: int
    chunk: int
    start: int
    block: int
    blocks: int
    representatives: int
    refresh: int = 1
    constant: bool = True

    @property
    def window(self) -> int:
        return self.budget - self.block

    @property
    def distance(self) -> int | None:
        return self.window if self.constant else None

    def cut(self, length: int) -> list[tuple[int, str]]:
        return [(n, "prompt") for n in pieces(length, self.chunk)]

    def flags(self, layer: Layer, moment: Moment) -> None:
        """Looks up: r of a block = sum over queries, heads and representatives of q . k."""
        count = len(layer.queries[0])
        first = moment.seen - count
        for i in range(first, moment.seen):
            for g in range(len(layer.attention)):
                turned = rotate(layer.queries[g][i - first][None], [i], layer.theta)[0]
                layer.rotated_queries.setdefault(g, []).append(turned)
        if moment.part == "decode" and first % self.refresh:
            return
        worth = []
        for marks in layer.marks:
            total = 0.0
            for h, mark in enumerate(marks):
                for g in layer.group(h):
                    for t in range(count):
                        at = first + t if self.distance is None else self.distance
                        total += float(rotate(layer.queries[g][t][None], [at], layer.theta)[0] @ mark)
            worth.append(total)
        order = sorted(range(len(worth)), key=lambda n: -worth[n])
        layer.found = sorted(order[: self.blocks])

    def beside(self, layer: Layer, head: int) -> tuple[list[Entry], int | None]:
        if not layer.away:
            return [], None
        away = layer.away[head]
        seen = away[: self.start]
        for block in layer.found:
            begin = self.start + block * self.block
            seen = seen + away[begin : begin + self.block]
        return seen, self.distance

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        """The first tokens go first, then whole blocks, until the budget holds the rest."""
        layer.away = layer.away or [[] for _ in layer.heads]
        while len(layer.heads[0]) > self.budget:
            size = self.block if layer.away[0] or not self.start else self.start
            leaving = [entries[:size] for entries in layer.heads]
            if layer.away[0] or not self.start:
                layer.marks.append([self._mark(layer, h, entries) for h, entries in enumerate(leaving)])
            for away, entries in zip(layer.away, leaving):
                away.extend(entries)
            layer.heads = [entries[size:] for entries in layer.heads]
        return layer.heads

    def _mark(self, layer: Layer, head: int, entries: list[Entry]) -> Tensor:
        """The keys that the next `window` queries have the largest mean q . k with, summed."""
        means = []
        for e in entries:
            key, total = rotate(e.key[None], [e.position], layer.theta)[0], 0.0
            for g in layer.group(head):
                for j in range(e.position + 1, e.position + 1 + self.window):
                    total += float(layer.rotated_queries[g][j] @ key)
            means.append(total / self.window)
        best = sorted(range(len(entries)), key=lambda n: -means[n])[: self.representatives]
        places = [0 if self.constant else entries[n].position for n in best]
        return rotate(torch.stack([entries[n].key for n in best]), places, layer.theta).sum(0)
