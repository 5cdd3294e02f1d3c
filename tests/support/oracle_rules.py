"""What each policy keeps, for tests/support/oracle.py: one small class a policy, loops over lists, from the papers' texts.

h is a kv head, g a query head, i the position of a query, j the position of a key, all in the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tests.support.oracle import Entry, Layer, Moment, Rule, pieces, rotate

Scores = list[list[float]]  # kv head -> one number an entry


def fraction(budget: int | float, n: int, protected: int) -> int:
    """A budget in slots: as it is, or a part of n tokens that leaves room for what is protected."""
    return budget if isinstance(budget, int) else max(math.floor(budget * n + 1e-9), protected + 1)


def best(entries: list[Entry], scores: list[float], slots: int, safe: list[bool]) -> list[Entry]:
    """The entries with the highest scores, in order; safe ones first, and of equals the earlier."""
    worth = [math.inf if s else x for s, x in zip(safe, scores, strict=True)]
    order = sorted(range(len(entries)), key=lambda n: -worth[n])  # stable
    return [entries[n] for n in sorted(order[:slots])]


@dataclass(kw_only=True)
class Scored(Rule):
    """Every (layer, kv head) keeps its `budget` best; this base class knows budgets, the rules know scores.

    policy: a rule that names its policy is tested with a budget and no other option; further cases are in
    tests/policies/test_policies.py.
    """

    policy: ClassVar[str] = ""
    budget: int | float
    chunk: int | None = None
    contiguous: bool = False
    sinks: int = 0
    recent: int | None = 0
    first_prompt_only: bool = False
    layer_budgets: str | tuple[int, ...] = "equal"
    beta: int = 20
    head_budgets: str = "equal"
    head_floor: float = 0.2
    protect: bool = False  # the whole first prompt

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        """The higher, the longer it stays."""
        raise NotImplementedError

    def cut(self, length: int) -> list[tuple[int, str]]:
        return [(n, "prompt") for n in pieces(length, self.chunk)]

    def window(self, slots: int) -> int:
        """How many of the newest are protected."""
        assert self.recent is not None
        return self.recent

    def safe(self, entries: list[Entry], recent: int) -> list[bool]:
        """Which entries are protected."""
        return [e.position < self.sinks or n >= len(entries) - recent for n, e in enumerate(entries)]

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        if self.first_prompt_only and not (moment.first and moment.part != "decode"):
            return layer.heads
        if self.protect and moment.first and moment.part != "decode":
            return layer.heads
        slots, recent = self.slots(layer, moment)
        scores = self.scores(layer, moment)
        safe = [self.safe(entries, recent) for entries in layer.heads]
        if self.protect:
            prompt = [[e.position < moment.first_prompt for e in entries] for entries in layer.heads]
            safe = [[a or b for a, b in zip(*pair)] for pair in zip(safe, prompt)]
        each = [slots] * len(layer.heads)
        if self.head_budgets == "adakv":
            each = self.per_head(layer, moment, slots, scores, safe)
        return [best(*x) for x in zip(layer.heads, scores, each, safe)]

    def slots(self, layer: Layer, moment: Moment) -> tuple[int, int]:
        """Slots and protected newest tokens of a head in this layer."""
        slots = fraction(self.budget, moment.total, self.sinks + (self.recent or 0))
        recent = self.window(slots)
        if isinstance(self.layer_budgets, tuple):
            slots = self.layer_budgets[layer.index]
        if self.layer_budgets == "pyramid":
            slots = self.pyramid(slots, self.sinks + recent, layer.index, moment.layers, moment.total)
        return slots, recent

    def pyramid(self, slots: int, window: int, layer: int, layers: int, n: int) -> int:
        """PyramidKV: an arithmetic sequence, the first layers more, the same in sum."""
        mean = slots - window
        if n < 2 * mean:
            return slots
        least = mean // self.beta
        most = 2 * mean - least
        if most > n - window:
            most = n - window
            least = 2 * mean - most
        step = (most - least) // (layers - 1)
        return most - layer * step + window

    def per_head(self, layer: Layer, moment: Moment, slots: int, scores: Scores, safe: list[list[bool]]) -> list[int]:
        """Ada-KV: heads compete for the layer's slots; a part of each head's equal share is certain."""
        equal = [slots] * len(layer.heads)
        if moment.part == "decode":
            return layer.head_slots or equal
        layer.head_slots = None
        if all(len(entries) <= slots for entries in layer.heads):
            return equal
        protected = [sum(s) for s in safe]
        candidates = [
            (-scores[h][n], h, entries[n].position)
            for h, entries in enumerate(layer.heads)
            for n in range(len(entries))
            if not safe[h][n]
        ]
        winners = sorted(candidates)[: sum(slots - p for p in protected)]
        layer.head_slots = []
        for h, entries in enumerate(layer.heads):
            count, share = sum(w[1] == h for w in winners), slots - protected[h]
            wanted = round(count * (1 - self.head_floor) + int(self.head_floor * share))  # halves to even
            layer.head_slots.append(min(protected[h] + wanted, len(entries)))
        return layer.head_slots


@dataclass(kw_only=True)
class StreamingRule(Scored):
    """The first `start` tokens and the last budget - start; keys re-ranked at every step, or left where they were."""

    contiguous: bool = True

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[e.position for e in entries] for entries in layer.heads]


@dataclass(kw_only=True)
class H2ORule(Scored):
    """Some of the budget (half) for the newest, the rest for those that received most attention since they came."""

    recent: int | None = None

    def window(self, slots: int) -> int:
        return slots // 2 if self.recent is None else self.recent

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [
            [layer.received(h, e.position, range(e.position, moment.seen)) for e in entries]
            for h, entries in enumerate(layer.heads)
        ]


@dataclass(kw_only=True)
class TovaRule(Scored):
    """What the last query looks at, on average over all heads; the same tokens in all kv heads, nothing protected."""

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        last = moment.seen - 1
        return [
            [sum(head[last][e.position] for head in layer.attention) / len(layer.attention) for e in entries]
            for entries in layer.heads
        ]


@dataclass(kw_only=True)
class SnapKVRule(Scored):
    """Attention from the last `recent` queries, averaged over the group, smoothed over neighbours; once."""

    first_prompt_only: bool = True
    kernel: int = 5
    pooling: str = "avg"

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        assert self.recent is not None
        n = moment.seen
        queries = range(max(0, n - self.recent), n)
        out = []
        for h, entries in enumerate(layer.heads):
            before = [layer.received(h, e.position, queries) / len(layer.group(h)) for e in entries]
            before = before[: max(0, n - self.recent)]
            side = self.kernel // 2
            padded = [0.0] * side + before + [0.0] * side
            spans = [padded[j : j + self.kernel] for j in range(len(before))]
            pooled = [max(s) if self.pooling == "max" else sum(s) / self.kernel for s in spans]
            out.append(pooled + [0.0] * (len(entries) - len(before)))
        return out


@dataclass(kw_only=True)
class ExpectedAttentionRule(Scored):
    """Attention of a normally distributed future query, times the length of the value; once."""

    first_prompt_only: bool = True
    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        n, size = moment.seen, layer.heads[0][0].key.shape[0]
        identity = torch.eye(size, dtype=torch.float64)
        # Row c of rotate(identity) is what the c-th unit vector becomes, so the matrix is its transpose.
        mean_rotation = sum(
            (rotate(identity, [p] * size, layer.theta).T for p in range(n, n + self.future)), torch.zeros(size, size)
        ) / max(1, self.future)
        out = []
        for h, entries in enumerate(layer.heads):
            later = [e for e in entries if e.position >= self.sinks]
            mean_weight = {e.position: 0.0 for e in entries}
            for g in layer.group(h) if later else ():
                queries = [layer.queries[g][e.position] for e in later]
                mu = sum(queries, torch.zeros(size)) / len(queries)
                sigma = sum((torch.outer(q - mu, q - mu) for q in queries), torch.zeros(size, size)) / len(queries)
                mu, sigma = mean_rotation @ mu, mean_rotation @ sigma @ mean_rotation.T
                keys = [layer.rotated(e) for e in later]
                logits = [mu @ k / size**0.5 + k @ sigma @ k / (2 * size) for k in keys]
                for e, weight in zip(later, torch.softmax(torch.stack(logits), dim=0).tolist()):
                    mean_weight[e.position] += weight / len(layer.group(h))
            out.append([(mean_weight[e.position] + self.epsilon) * length(e.value) for e in entries])
        return out


def length(x: Tensor) -> float:
    """Euclidean."""
    return sum(c * c for c in x.tolist()) ** 0.5


@dataclass(kw_only=True)
class KeyDiffRule(Scored):
    """Keys that point away from the mean direction of all keys stay."""

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        out = []
        for entries in layer.heads:
            keys = [layer.rotated(e) for e in entries]
            anchor = sum((k / length(k) for k in keys), torch.zeros_like(keys[0])) / len(keys)
            out.append([-float(k @ anchor) / (length(k) * length(anchor)) for k in keys])
        return out


@dataclass(kw_only=True)
class KnormRule(Scored):
    """Short keys stay."""

    policy = "knorm"

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[-length(e.key) for e in entries] for entries in layer.heads]


def uniform(seed: int, layer: int, head: int, position: int) -> float:
    """A number in (0, 1) that depends on its arguments only: splitmix64's finalizer."""
    mask = 2**64 - 1
    z = seed * 0x9E3779B97F4A7C15 + layer * 0xBF58476D1CE4E5B9 + head * 0x94D049BB133111EB
    z = (z + (position + 1) * 0xD6E8FEB86659FD93) & mask
    z ^= z >> 30
    z = (z * 0xBF58476D1CE4E5B9) & mask
    z ^= z >> 27
    z = (z * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return ((z >> 40) + 0.5) / 2**24


@dataclass(kw_only=True)
class RandomRule(Scored):
    """Whatever the hash says."""

    seed: int = 0

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [
            [uniform(self.seed, layer.index, h, e.position) for e in entries] for h, entries in enumerate(layer.heads)
        ]


@dataclass(kw_only=True)
class ScissorhandsRule(Scored):
    """When the cache is over its budget, a share of it goes at once: what the last queries found unimportant, that is
    gave no more than the average weight."""

    drop: float = 0.5
    history: int = 400

    def slots(self, layer: Layer, moment: Moment) -> tuple[int, int]:
        slots, recent = super().slots(layer, moment)
        if layer.longest > slots:
            return max(slots - int(self.drop * slots), recent + 1), recent
        return slots, recent

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        queries = range(max(layer.counted_from, moment.seen - self.history), moment.seen)
        return [
            [
                sum(layer.attention[g][i].get(e.position, 0.0) > 1 / (i + 1) for g in layer.group(h) for i in queries)
                for e in entries
            ]
            for h, entries in enumerate(layer.heads)
        ]

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        kept = super().keep(layer, moment)
        if layer.longest > super().slots(layer, moment)[0]:
            layer.counted_from = moment.seen
        return kept


@dataclass(kw_only=True)
class SirLLMRule(Scored):
    """Surprising tokens stay, in all layers and heads; older turns fade."""

    contiguous: bool = True
    sinks: int = 4
    decay: float = 1.0

    def turn(self, layer: Layer) -> None:
        for entries in layer.heads:
            for e in entries:
                e.surprisal *= self.decay

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[e.surprisal for e in entries] for entries in layer.heads]


@dataclass(kw_only=True)
class NACLRule(Scored):
    """Some newest (and first) tokens, the best by attention from proxy tokens, and a random sample of the others in which
    a token's chance is proportional to exp(its score). In the first prompt, and after every `interval` generated tokens,
    which are the proxies then."""

    preset: str = "paper"
    seed: int = 0
    interval: int = 128

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        counted_from = layer.counted_from
        if moment.part != "decode":
            layer.counted_from = moment.seen
            if not moment.first:
                return layer.heads
            share = {"paper": 0.2, "code": 0.01}[self.preset]
            proxies = range(moment.seen - max(1, int(share * moment.prompt)), moment.seen)
        else:
            if self.interval == 0 or moment.generated % self.interval != 0:
                return layer.heads
            layer.counted_from = moment.seen
            proxies = range(counted_from, moment.seen)
        slots, protected = self.slots(layer, moment)
        return [self.sample(layer, h, slots, protected, proxies) for h in range(len(layer.heads))]

    def window(self, slots: int) -> int:
        """All protected tokens; by the budget that layers have on average."""
        return int({"paper": 0.1, "code": 0.05}[self.preset] * slots)

    def sample(self, layer: Layer, head: int, slots: int, protected: int, proxies: range) -> list[Entry]:
        entries = layer.heads[head]
        if len(entries) <= slots:
            return entries
        if self.preset == "paper":
            sinks, at_random = 0, int((slots - protected) * 2 / 3)
        else:
            sinks = min(256, protected // 2)
            at_random = slots - protected - int((slots - protected) * 12 / 19)
        newest, top = protected - sinks, slots - protected - at_random
        rest = entries[sinks : len(entries) - newest]
        score = {e.position: layer.received(head, e.position, proxies) for e in rest}
        rest.sort(key=lambda e: -score[e.position])
        chosen, rest = rest[:top], rest[top:]
        # The largest of score + Gumbel noise are a sample without replacement by softmax(score).
        noise = {e.position: -math.log(-math.log(uniform(self.seed, layer.index, head, e.position))) for e in rest}
        rest.sort(key=lambda e: -(score[e.position] + noise[e.position]))
        chosen.sort(key=lambda e: e.position)
        stays = {
            e.position
            for e in self.first([*entries[len(entries) - newest :]], [*entries[:sinks], *chosen, *rest], slots)
        }
        return [e for e in entries if e.position in stays]

    def first(self, newest: list[Entry], rest: list[Entry], slots: int) -> list[Entry]:
        """What stays, of entries in order of what they are worth."""
        return [*newest, *rest][:slots]


@dataclass(kw_only=True)
class LocretRule(Scored):
    """Algorithm 1 of Locret; retaining_heads: per layer (fc1, fc2). Locret-Q protects the question, the first `sinks`."""

    stabilizers: int
    local_tail: int
    decode_eviction: bool = False
    contiguous: bool = True
    retaining_heads: list[tuple[Tensor, Tensor]]

    def cut(self, length: int) -> list[tuple[int, str]]:
        tail = min(self.local_tail, length)
        body = pieces(length - tail, self.chunk) if length > tail else []
        parts = [(n, "chunk") for n in body[:-1]] + [(n, "last chunk") for n in body[-1:]]
        return parts + ([(tail, "tail")] if tail else [])

    def arrive(self, layer: Layer, count: int) -> None:
        fc1, fc2 = (w.double() for w in self.retaining_heads[layer.index])
        hidden = layer.projected @ fc1.T
        scores = (hidden * torch.sigmoid(hidden)) @ fc2.T
        for h, entries in enumerate(layer.heads):
            for t in range(count):
                entries[len(entries) - count + t].score = float(scores[t, h])

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[e.score for e in entries] for entries in layer.heads]

    def slots(self, layer: Layer, moment: Moment) -> tuple[int, int]:
        slots, _ = super().slots(layer, moment)
        return slots, self.stabilizers if moment.part == "chunk" else 0

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        if moment.part == "tail" or (moment.part == "decode" and not self.decode_eviction):
            return layer.heads
        return super().keep(layer, moment)

    def renews(self, part: str, after: str) -> bool:
        # The authors re-rank at every forward. Without eviction in decoding nothing changes then; with it (ours) the
        # ranks that the prompt ended with stay.
        return part != "decode" or after != "decode"


@dataclass(kw_only=True)
class AttentionGateRule(Rule):
    """A small attention over all tokens so far decides for each prompt token and kv head whether it is cached. With a
    budget (ours) those stay that are surest to."""

    gates: list[dict[str, Tensor]]  # layer -> "q", "k", "v", "o", "bias"
    gate_heads: int
    chunk: int | None = None
    sinks: int = 4
    threshold: float = 0.5
    budget: int | float | None = None

    def cut(self, length: int) -> list[tuple[int, str]]:
        return [(n, "prompt") for n in pieces(length, self.chunk)]

    def chances(self, layer: Layer, i: int) -> list[float]:
        """kv head -> the probability that the token at i stays."""
        gate = {name: w.double() for name, w in self.gates[layer.index].items()}
        x = torch.stack(layer.inputs[: i + 1])
        q, k, v = (x @ gate[n].T for n in "qkv")
        size = q.shape[1] // self.gate_heads
        out = []
        for r in range(self.gate_heads):
            part = slice(r * size, (r + 1) * size)
            weights = torch.softmax(k[:, part] @ q[i, part] / size**0.5, dim=0)
            out.append(weights @ v[:, part])
        return torch.sigmoid(gate["o"] @ torch.cat(out) + gate["bias"]).tolist()

    def flags(self, layer: Layer, moment: Moment) -> list[list[bool]] | None:
        if moment.part == "decode":
            return None
        new = range(moment.seen - layer.projected.shape[0], moment.seen)
        chances = {i: self.chances(layer, i) for i in new}
        return [[i >= self.sinks and chances[i][h] <= self.threshold for i in new] for h in range(len(layer.heads))]

    def arrive(self, layer: Layer, count: int) -> None:
        for h, entries in enumerate(layer.heads):
            for e in entries[len(entries) - count :] if self.budget is not None else ():
                e.score = self.chances(layer, e.position)[h]

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        heads = [[e for e in entries if not e.flagged] for entries in layer.heads]
        if self.budget is None or moment.part == "decode":
            return heads
        slots = fraction(self.budget, moment.total, self.sinks)
        return [best(h, [e.score for e in h], slots, [e.position < self.sinks for e in h]) for h in heads]
