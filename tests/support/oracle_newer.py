"""What newer policies keep, as tests/support/oracle_rules.py has it of the others: loops over
lists, from the definitions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.oracle import Entry, Layer, Moment, rotate
from tests.support.oracle_rules import Scored, Scores, SnapKVRule, fraction, length, uniform


@dataclass(kw_only=True)
class ObservedAttentionRule(Scored):
    """What a token received, per query that has seen it."""

    policy = "observed_attention"

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        n = moment.seen
        return [
            [layer.received(h, e.position, range(e.position, n)) / (n - e.position) for e in entries]
            for h, entries in enumerate(layer.heads)
        ]


@dataclass(kw_only=True)
class CriticalKVRule(SnapKVRule):
    """The best by SnapKV's attention, the window first; then the best by attention times what the value adds to the
    layer's output, in the L1 norm."""

    first_stage: float = 0.5
    epsilon: float = 1e-4

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        assert self.recent is not None
        slots, _ = self.slots(layer, moment)
        out = []
        for h, (entries, scores) in enumerate(zip(layer.heads, super().scores(layer, moment))):
            attention = [x / self.recent for x in scores]
            safe = self.safe(entries, self.recent)
            order = sorted(range(len(entries)), key=lambda n: (not safe[n], -attention[n]))
            first = set(order[: math.floor(self.first_stage * slots)])
            worth = [(a + self.epsilon) * self.moves(layer, h, e) for a, e in zip(attention, entries)]
            out.append([math.inf if n in first else x for n, x in enumerate(worth)])
        return out

    def moves(self, layer: Layer, head: int, entry: Entry) -> float:
        """Mean over the group of the L1 norm of the value after the output projection."""
        size, group = len(entry.value), layer.group(head)
        total = 0.0
        for g in group:
            for row in layer.output[:, g * size : (g + 1) * size]:
                total += abs(float(row @ entry.value))
        return total / len(group)


@dataclass(kw_only=True)
class FinchRule(Scored):
    """Attention from the question's queries, each times the number of tokens before it; once,
    re-rotated."""

    first_prompt_only: bool = True
    contiguous: bool = True
    normalize: bool = True

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        assert self.recent is not None
        n = moment.seen
        out = []
        for h, entries in enumerate(layer.heads):
            total = [0.0] * len(entries)
            for i in range(max(0, n - self.recent), n):
                seen = i if self.normalize else 1
                total = [t + seen * layer.received(h, e.position, range(i, i + 1)) for t, e in zip(total, entries)]
            out.append(total)
        return out


@dataclass(kw_only=True)
class LagKVRule(Scored):
    """Per block: how much a key's and a value's channels, measured by the next block's least and
    largest, deviate."""

    first_prompt_only: bool = True
    sinks: int = 4
    lag: int = 128
    across: bool = False

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        out = []
        for entries in layer.heads:
            cut = [entries[at : at + self.lag] for at in range(self.sinks, len(entries), self.lag)]
            cut = [block for block in cut if len(block) == self.lag]
            worth = [1.0 + e.position for e in entries]  # what has no block after it
            for block, following in itertools.pairwise(cut):
                rotated = self.softmax([layer.rotated(e) for e in block], [layer.rotated(e) for e in following])
                values = self.softmax([e.value for e in block], [e.value for e in following])
                mean = [(a + b) / 2 for a, b in zip(rotated, values)]
                for e, score in zip(block, mean):
                    worth[e.position] = score if self.across else sum(score > other for other in mean) / self.lag
            out.append(worth)
        return out

    def softmax(self, block: list[Tensor], following: list[Tensor]) -> list[float]:
        low = [min(column) for column in zip(*(x.tolist() for x in following))]
        high = [max(column) for column in zip(*(x.tolist() for x in following))]
        spread = []
        for x in block:
            u = [(c - a) / (b - a) for c, a, b in zip(x.tolist(), low, high)]
            mean = sum(u) / len(u)
            spread.append((sum((c - mean) ** 2 for c in u) / (len(u) - 1)) ** 0.5)
        total = sum(math.exp(s) for s in spread)
        return [math.exp(s) / total for s in spread]


@dataclass(kw_only=True)
class CompactorRule(Scored):
    """z-scores of leverage and of attention from both sides, added. part: "both", or one of them as
    it is."""

    first_prompt_only: bool = True
    part: str = "both"
    block: int = 256
    sketch: int = 48
    seed: int = 0
    blending: float | None = None

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        assert self.recent is not None
        n = moment.seen
        inside = range(self.sinks, n - self.recent)
        if not inside:
            return [[0.0] * n for _ in layer.heads]
        leverage, attention = [], []
        for h, entries in enumerate(layer.heads):
            taken = [entries[i] for i in inside]
            leverage.append(self.leverage(layer, h, taken))
            attention.append(self.attention(layer, h, taken))
        if self.part != "both":
            return leverage if self.part == "leverage" else attention
        slots, _ = self.slots(layer, moment)
        blending = max(0.0, 1 - slots / n) if self.blending is None else self.blending
        pairs = zip(standard(leverage), standard(attention))
        ends = [0.0] * self.sinks, [0.0] * self.recent
        return [[*ends[0], *(blending * x + y for x, y in zip(a, b)), *ends[1]] for a, b in pairs]

    def leverage(self, layer: Layer, head: int, entries: list[Entry]) -> list[float]:
        """The j-th diagonal number of X (X^T X + 0.01)^-1 X^T, of sketched keys without
        rotation."""
        size = entries[0].key.shape[0]
        matrix = sketch(self.seed, layer.index, head, size, self.sketch)
        keys = torch.stack([e.key for e in entries])
        x = (keys - keys.mean(0)) @ torch.tensor(matrix, dtype=torch.float64) / self.sketch**0.5
        inverse = torch.linalg.inv(x.T @ x + 0.01 * torch.eye(self.sketch, dtype=torch.float64))
        return [float(row @ inverse @ row) for row in x]

    def attention(self, layer: Layer, head: int, entries: list[Entry]) -> list[float]:
        """Column sums of attention without a mask or a scale in every block, times ||v||; the mean
        of three neighbours."""
        weighed = []
        for at in range(0, len(entries), self.block):
            block = entries[at : at + self.block]
            keys, places = torch.stack([layer.rotated(e) for e in block]), [e.position for e in block]
            total = torch.zeros(len(block), dtype=torch.float64)
            for g in layer.group(head):
                queries = rotate(layer.queries[g][places], places, layer.theta)
                for q in queries:
                    total += torch.softmax(keys @ q, dim=0)
            weighed += [float(t) / len(layer.group(head)) * length(e.value) for t, e in zip(total, block)]
        padded = [0.0, *weighed, 0.0]
        return [sum(padded[j : j + 3]) / 3 for j in range(len(weighed))]


def sketch(seed: int, layer: int, head: int, rows: int, columns: int) -> list[list[float]]:
    """A matrix of normal numbers: Box and Muller's, of two hashed ones each."""

    def normal(place: int) -> float:
        u, v = (uniform(seed, layer, head, place + more) for more in (0, rows * columns))
        return (-2 * math.log(u)) ** 0.5 * math.cos(2 * math.pi * v)

    return [[normal(c * columns + s) for s in range(columns)] for c in range(rows)]


def standard(scores: Scores) -> Scores:
    """All together with mean 0 and deviation 1."""
    flat = [x for head in scores for x in head]
    mean = sum(flat) / len(flat)
    deviation = max((sum((x - mean) ** 2 for x in flat) / max(1, len(flat) - 1)) ** 0.5, 1e-6)
    return [[(x - mean) / deviation for x in head] for head in scores]


@dataclass(kw_only=True)
class RandomAttentionRule(Scored):
    """The first prompt and the newest stay; the others draw anew whenever the buffer is full."""

    buffer: int
    seed: int = 0
    protect: bool = True

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [
            [uniform(self.seed, layer.index, h, e.position + (moment.seen << 32)) for e in entries]
            for h, entries in enumerate(layer.heads)
        ]

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        full = layer.longest >= fraction(self.budget, moment.total, self.buffer) + self.buffer
        return super().keep(layer, moment) if full or moment.part != "decode" else layer.heads


@dataclass(kw_only=True)
class QFiltersRule(Scored):
    """Keys with the largest part against the filters, as they are rotated when they come, which is the same for all heads;
    filters: layer -> (kv heads, D)."""

    filters: list[Tensor]

    def arrive(self, layer: Layer, count: int) -> None:
        for h, entries in enumerate(layer.heads):
            for t, e in enumerate(entries[len(entries) - count :]):
                key = rotate(e.key[None], [layer.row_place + t], layer.theta)[0]
                e.score = -float(self.filters[layer.index][h].double() @ key)

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[e.score for e in entries] for entries in layer.heads]


@dataclass(kw_only=True)
class RKVRule(Scored):
    """A full buffer is cut down by importance to the last queries less redundancy among keys."""

    buffer: int
    kernel: int = 7
    share: float = 0.1

    def arrive(self, layer: Layer, count: int) -> None:
        seen = layer.heads[0][-1].position + 1
        places = list(range(seen - count, seen))
        for g, new in enumerate(layer.queries):
            layer.rotated_queries.setdefault(g, []).extend(rotate(new, places, layer.theta))

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        out = []
        for h, entries in enumerate(layer.heads):
            keys = [layer.rotated(e) for e in entries]
            important, redundant = self.importance(layer, h, keys), self.redundancy(keys)
            mixed = [self.share * a - (1 - self.share) * b for a, b in zip(important, redundant)]
            out.append(mixed + [0.0] * (len(entries) - len(mixed)))
        return out

    def importance(self, layer: Layer, head: int, keys: list[Tensor]) -> list[float]:
        assert self.recent is not None
        before = keys[: -self.recent]
        total = [0.0] * len(before)
        last = list(zip(*(layer.rotated_queries[g][-self.recent :] for g in layer.group(head))))
        for group in last if before else ():
            logits = [max(float(q @ k) for q in group) / k.shape[0] ** 0.5 for k in before]
            weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0).tolist()
            total = [t + w / len(last) for t, w in zip(total, weights)]
        side = self.kernel // 2
        return [max(total[max(0, j - side) : j + side + 1]) for j in range(len(total))]

    def redundancy(self, keys: list[Tensor]) -> list[float]:
        likeness = [[float(a @ b) / (length(a) * length(b)) for b in keys] for a in keys]
        for i, row in enumerate(likeness):
            row[i] = 0.0
            like = [j for j, x in enumerate(row) if x > 0.5]
            if like:
                row[like[-1]] = 0.0
        means = [sum(column) / len(keys) for column in zip(*likeness)]
        return torch.softmax(torch.tensor(means, dtype=torch.float64), dim=0).tolist()

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        full = layer.longest >= fraction(self.budget, moment.total, self.recent or 0) + self.buffer
        return super().keep(layer, moment) if full or moment.part != "decode" else layer.heads
