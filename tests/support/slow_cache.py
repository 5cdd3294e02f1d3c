"""A slow and obvious quantized cache of one head: dicts of slots, lists of floats."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Vector = list[float]
# All numbers that float8_e4m3fn has, from small to large; even ones at even places.
FP8 = [m / 8 * 2.0**-6 for m in range(8)] + [
    (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]


def ends_of(members: list[float], kind: str) -> list[float]:
    """What a group of numbers keeps."""
    return [max(abs(x) for x in members)] if kind == "fp8" else [min(members), max(members)]


def rounded(x: float, ends: list[float], kind: str) -> float:
    """What becomes of a number in a group with these ends."""
    if kind == "fp8":
        if ends[0] == 0:
            return 0.0
        unit = float(np.float32(abs(x) / ends[0] * 448))  # torch goes by way of fp32, which matters for ties
        best = min(range(len(FP8)), key=lambda i: (abs(FP8[i] - unit), i % 2))
        return (FP8[best] if x > 0 else -FP8[best]) / 448 * ends[0]
    lo, hi = ends
    if lo == hi:
        return lo
    levels = 15 if kind == "int4" else 255
    code = round((x - lo) / (hi - lo) * levels)
    return lo + (hi - lo) * code / levels


class SlowHead:
    """Keys and values by position in the text, as the cache has them."""

    def __init__(self, kind: str, group: int, residual: int):
        self.kind, self.group, self.residual = kind, group, residual
        self.slots: dict[int, int] = {}  # slot -> position of what is quantized there
        self.tail: list[int] = []  # positions
        self.keys: dict[int, Vector] = {}
        self.values: dict[int, Vector] = {}
        self.ends: dict[int, list[list[float]]] = {}  # group of slots -> channel -> ends
        self.recoded: set[int] = set()  # groups that the last step wrote

    def order(self) -> list[int]:
        """Positions in the order of slots."""
        return [self.slots[s] for s in sorted(self.slots)] + self.tail

    def step(self, kept: Iterable[int], new: dict[int, tuple[Vector, Vector]], merged: Iterable[int] = ()) -> None:
        """new: tokens by position; kept: positions that stay; merged: those whose key and value the caller has changed."""
        kept, merged = set(kept), set(merged)
        for position, (key, value) in new.items():
            self.keys[position], self.values[position] = list(key), list(value)
        stays = {s: p for s, p in self.slots.items() if p in kept}
        fresh = sorted(p for p in (*self.tail, *new) if p in kept)
        end = -(-len(self.slots) // self.group) * self.group
        holes = [s for s in range(end) if s not in stays]
        excess = max(0, len(fresh) - self.residual)
        into_holes = min(excess, len(holes))
        flushed = into_holes + (excess - into_holes) // self.group * self.group
        q = len(stays) + flushed
        placed = {s: p for s, p in stays.items() if s < q}
        anchored = {s for s, p in placed.items() if p not in merged}
        arrivals = [*fresh[:flushed], *(stays[s] for s in sorted(stays) if s >= q)]
        free = [s for s in range(q) if s not in placed]
        assert len(free) == len(arrivals)
        placed.update(zip(free, arrivals))
        self.slots, self.tail = placed, fresh[flushed:]
        assert sorted(self.slots) == list(range(q)) and len(self.tail) < self.residual + self.group
        for p in [*fresh[:flushed], *(p for p in merged if p in stays.values())]:
            self._round_value(p)
        self.recoded = {s // self.group for s in range(q) if s not in anchored}
        for g in self.recoded:
            self._round_keys(g, any(s in anchored for s in range(g * self.group, (g + 1) * self.group)))
        for p in [p for p in self.keys if p not in kept]:
            del self.keys[p], self.values[p]

    def _round_value(self, position: int) -> None:
        value = self.values[position]
        size = max(n for n in range(1, min(self.group, len(value)) + 1) if len(value) % n == 0)
        for at in range(0, len(value), size):
            ends = ends_of(value[at : at + size], self.kind)
            value[at : at + size] = [rounded(x, ends, self.kind) for x in value[at : at + size]]

    def _round_keys(self, g: int, widen: bool) -> None:
        members = [self.keys[self.slots[s]] for s in range(g * self.group, (g + 1) * self.group) if s in self.slots]
        found = [ends_of([m[d] for m in members], self.kind) for d in range(len(members[0]))]
        if widen and self.kind == "fp8":
            found = [[max(a[0], b[0])] for a, b in zip(found, self.ends[g])]
        elif widen:
            found = [[min(a[0], b[0]), max(a[1], b[1])] for a, b in zip(found, self.ends[g])]
        self.ends[g] = found
        for member in members:
            member[:] = [rounded(x, ends, self.kind) for x, ends in zip(member, found)]


class SlowSlots:
    """The slots of one head: a list of token numbers, in which anything but the newest may go."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        self.tokens: list[int] = []
        self.seen = 0

    def add(self, count: int) -> None:
        """New tokens join."""
        self.tokens += range(self.seen, self.seen + count)
        self.seen += count

    def keep(self, count: int) -> None:
        """One after another goes until `count` are left; those after it move up."""
        while len(self.tokens) > count:
            del self.tokens[int(self.random.integers(0, max(1, len(self.tokens) - 1)))]

    def slide(self, window: int) -> None:
        """A layer with a window needs its newest `window` tokens."""
        self.tokens = self.tokens[max(0, len(self.tokens) - window) :]

    def first_changed(self, before: list[int]) -> int:
        """The first slot that holds another token than `before`, or one more."""
        same = [a == b for a, b in zip(before, self.tokens)]
        return same.index(False) if False in same else len(same)
