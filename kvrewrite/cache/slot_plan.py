"""The slot arithmetic: how many slots each head holds before, during and after a step. Host code in numpy, without
torch.

`SlotPlanner.plan` takes what is held and what each row's new tokens do, changes nothing, and returns a `StepPlan`.
Chunks of prompts, single tokens and tokens that are planned ahead follow such plans; the memory plan and the FLOP model
walk through a prompt with the same functions (`slots_after`, `prompt_slots`).

Arrays are (layers, rows, kv heads) int64 where nothing else is said. A class is layers whose caches have equal shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvrewrite.ir.layout import PAGE
from kvrewrite.policies.base import Policy
from kvrewrite.policies.segments import UNLIMITED, Segment

NEVER = UNLIMITED // 256  # stands for no budget where budgets of heads are summed up


class Held(Protocol):
    """What a cache has of a class. layers: their numbers; windows (layers,): most slots that a layer ever needs, 0: no
    limit; bound: most slots that each head can hold."""

    layers: list[int]
    kv_heads: int
    windows: np.ndarray
    bound: np.ndarray


# -- one head, or arrays of heads ------------------------------------------------------------------------------------
def slots_after(held: Any, new: Any, keep: Any, window: Any = UNLIMITED) -> Any:
    """Slots that are held once `new` tokens have joined `held` and all but `keep` have gone; a layer with a window
    never needs more than that."""
    return np.minimum(np.minimum(held + new, keep), window)


def slots_decoded(held: Any, tokens: Any, keep: Any, window: Any = UNLIMITED) -> Any:
    """Slots after `tokens` single tokens where each keeps `keep` slots, or what there was if that is more."""
    return slots_after(held, tokens, np.maximum(keep, held), window)


def pages_of(slots: np.ndarray) -> np.ndarray:
    """Pages that hold so many slots."""
    return -(-slots // PAGE)


def walk(segments: Sequence[Segment], held: int) -> Iterator[tuple[int, int]]:
    """Most slots of a head while each segment runs, and after it."""
    for segment in segments:
        during = held + segment.joins
        held = min(during, segment.keep)
        yield during, held


# -- budgets ---------------------------------------------------------------------------------------------------------
def head_budgets(policy: Policy, segment: Segment, total: int, heads: Sequence[int]) -> list[list[int]]:
    """Slots that each kv head of each layer that owns a cache keeps after a segment. total: tokens of the row once its
    prompt is through; heads: kv heads of each such layer."""
    keeps = policy.layer_keeps(segment, total, len(heads))
    return [policy.head_keeps(keep, i, n) for i, (keep, n) in enumerate(zip(keeps, heads, strict=True))]


def prompt_slots(
    policy: Policy,
    segments: Sequence[Segment],
    heads: Sequence[int],
    windows: Sequence[int],
    held: Sequence[np.ndarray] | None = None,
    seen: int = 0,
) -> list[np.ndarray]:
    """Slots of the heads of each layer that owns a cache, before each segment of a row's prompt and after the last: of
    each layer (segments + 1, kv heads). heads: kv heads of each; windows: of each, 0: none; held: slots of the heads of
    each before it, where it is not the first prompt; seen: tokens before it. Where the device deals out pages, heads
    have these on average."""
    spans = np.repeat([window or UNLIMITED for window in windows], heads)
    before = np.zeros(sum(heads), dtype=np.int64) if held is None else np.concatenate(held)
    found, total = [before], seen + sum(s.joins for s in segments)
    for segment in segments:
        keeps = [keep for layer in head_budgets(policy, segment, total, heads) for keep in layer]
        found.append(slots_after(found[-1], segment.joins, keeps, spans))
    return np.split(np.stack(found), np.cumsum(heads)[:-1], axis=1)


# -- a step ----------------------------------------------------------------------------------------------------------
class Budgets(NamedTuple):
    """keep: what an eviction of a class is told; limit: what bounds a head by that (nothing where layers share a
    budget, of which a head may have more than its part); most: that, and the layer's window."""

    keep: np.ndarray
    limit: np.ndarray
    most: np.ndarray


@dataclass
class ClassPlan:
    """What a step does to a class.

    bound: most slots of each head before it; new: tokens that join (1, rows, 1); runs: rows that have tokens at all (1,
    rows, 1), of which those of a repetition do not join; budgets: of its eviction; after: slots after
    it, as far as the host can tell; prompts (rows,): whose eviction is ragged; deals (rows,): those for which the
    device deals out pages; anywhere: rows (and layers) where it may write to any slot; tail: slots from the end of a
    head that it may write to elsewhere. pressed (layers, rows): layers that lose tokens, which may be those of other
    processes' heads; ranks: how many processes the heads are dealt out over.
    """

    bound: np.ndarray
    new: np.ndarray
    runs: np.ndarray
    budgets: Budgets
    after: np.ndarray
    prompts: np.ndarray
    deals: np.ndarray
    anywhere: np.ndarray
    tail: int
    pressed: np.ndarray
    ranks: int = 1

    @property
    def evicts(self) -> np.ndarray:
        """Heads that lose tokens."""
        return (self.bound + self.new > self.budgets.most) & self.runs

    @property
    def first_written(self) -> np.ndarray:
        """The first slot that the step may write to; UNLIMITED where it writes to none, or to pages that are dealt to
        it."""
        deals = self.deals[None, :, None]
        appends = np.where(deals, UNLIMITED, np.maximum(self.bound - self.tail, 0))
        first = np.where(self.anywhere | (self.evicts & ~deals), 0, appends)
        return np.where(self.runs, first, UNLIMITED)

    @property
    def during(self) -> np.ndarray:
        """Slots that each head needs pages for while the step runs, besides those that are dealt out."""
        most = np.maximum(self.bound, self.after)
        return np.where(self.deals[None, :, None], self.bound, most) if self.deals.any() else most

    @property
    def dealt_slots(self) -> np.ndarray:
        """Most slots that all heads of a layer can hold together after pages were dealt out: (layers, rows)."""
        budgets = (np.minimum(self.budgets.limit, NEVER) + 1).sum(-1) * self.ranks
        return np.where(self.deals, np.minimum((self.bound + self.new).sum(-1), budgets), 0)

    @property
    def dealt_most(self) -> int:
        """Most slots that one head can hold then."""
        return int((self.bound + self.new)[:, self.deals].max(initial=0))

    def with_dealt(self, after: np.ndarray, dealt: np.ndarray) -> np.ndarray:
        """`after`, with what heads were dealt where they were."""
        return np.where(self.deals[None, :, None], dealt, after)

    def next_shares(self, shares: np.ndarray, dealt: np.ndarray | None) -> np.ndarray:
        """What each head may keep of its layer's budget from now on, -1 for an equal share: what it was dealt (None:
        nothing was dealt, or heads do not compete) where its layer had to evict; a prompt that fits makes shares equal
        again."""
        evicted = self.pressed[..., None]
        tries = self.prompts[None, :, None] & (self.budgets.limit < UNLIMITED)
        shares = np.where(tries & ~evicted, -1, shares)
        if dealt is not None:
            shares = np.where(self.deals[None, :, None] & evicted, dealt, shares)
        return shares


@dataclass
class StepPlan:
    """What a step does. segments: what each row does, None: nothing; ragged: whether some row's prompt has a ragged
    eviction, which needs `ClassPlan.next_shares`; loose: whether heads can end up with fewer slots than `after`."""

    segments: Sequence[Segment | None]
    classes: list[ClassPlan]
    ragged: bool
    loose: bool

    @property
    def limited(self) -> bool:
        """Whether any row's segment has a budget, so that something may go."""
        return any(s is not None and s.keep < UNLIMITED for s in self.segments)

    @functools.cached_property
    def tokens(self) -> list[int]:
        """Tokens that join each row."""
        return [s.joins if s is not None else 0 for s in self.segments]

    def longest(self, seen: Sequence[int]) -> int:
        """Tokens of the longest row after the step, of rows that have `seen`."""
        return max(before + new for before, new in zip(seen, self.tokens))

    def most_kept(self, row: int) -> int:
        """The largest budget that a head of a row has."""
        return max(int(part.budgets.keep[:, row].max()) for part in self.classes)


@dataclass(frozen=True)
class Rules:
    """What a program says about its slots. rewrites: whether a step may write to cached slots though nothing goes;
    tail: slots from the end of a head that the next token may write to (quantized caches). ranks: how many processes the
    heads are dealt out over; anyone: where any of them has a flag set. windows: whether layers lose what is outside their
    window."""

    rewrites: bool = False
    tail: int = 0
    ranks: int = 1
    windows: bool = True
    anyone: Callable[[np.ndarray], np.ndarray] | None = None


class SlotPlanner:
    """Plans the steps of one cache. It remembers nothing but the last budgets, which most steps share."""

    def __init__(self, policy: Policy, rules: Rules, classes: Sequence[Held]):
        self.policy, self.rules = policy, rules
        order = sorted((layer, c, i) for c, held in enumerate(classes) for i, layer in enumerate(held.layers))
        self._places = [
            (c, i) for _, c, i in order
        ]  # of each layer that owns a cache: its class, and where it is there
        self._heads = [classes[c].kv_heads for c, _ in self._places]
        self._shapes = [(len(held.layers), held.kv_heads) for held in classes]
        self._windows = [
            np.where((held.windows > 0) & rules.windows, held.windows, UNLIMITED)[:, None, None] for held in classes
        ]
        self._rewrites = rules.rewrites or policy.data_dependent
        self._steady = policy.layer_budgets == "equal" and type(policy).layer_keeps is Policy.layer_keeps
        self._known: tuple[Any, Any, list[Budgets]] = (None, None, [])

    def plan(
        self,
        held: Sequence[Held],
        shares: list[np.ndarray],
        segments: Sequence[Segment | None],
        totals: Sequence[int],
        renew: Sequence[bool] | None = None,
    ) -> StepPlan:
        """One step. shares: what each head keeps of its layer's budget after a ragged eviction, -1: an equal part
        (another list once that changes); totals: each row's tokens once its prompt is through; renew: rows whose ranks
        are made again (contiguous positions)."""
        new = np.array([s.joins if s is not None else 0 for s in segments], dtype=np.int64)
        runs = np.array([s is not None and s.length > 0 for s in segments], dtype=bool)
        prompts = np.array([self._is_ragged(s) for s in segments], dtype=bool) & runs
        anew = False if renew is None else np.array(renew)[None, :, None]
        ragged, joined, running, parts = bool(prompts.any()), new[None, :, None], runs[None, :, None], []
        for of_class, budgets, windows in zip(held, self._budgets(shares, segments, totals), self._windows):
            bound = of_class.bound
            after = np.minimum(bound + joined, budgets.most)
            if not runs.all():
                after = np.where(running, after, bound)
            anywhere = (windows < UNLIMITED) | self._rewrites
            part = ClassPlan(
                bound, joined, running, budgets, after, prompts, prompts, anywhere | anew, self.rules.tail, prompts
            )
            if ragged:
                pressed: Any = part.evicts.any(2)
                part.ranks, part.pressed = self.rules.ranks, pressed
                if self.rules.anyone is not None and self.policy.head_budgets != "equal":
                    part.pressed = self.rules.anyone(part.pressed)
                deals = part.deals = prompts & (part.pressed.any(0) | self._always_deals(segments))
                part.anywhere = anywhere & ~deals[None, :, None] | anew
            parts.append(part)
        return StepPlan(segments, parts, ragged, self.policy.data_dependent)

    def _always_deals(self, segments: Sequence[Segment | None]) -> Any:
        """Rows (or all) whose heads are dealt pages though no budget is pressed. Where layers share a budget, a segment
        without one takes nothing, and what a repetition leaves lies in the pages that heads have."""
        if self.policy.shares_layers:
            return np.array([s is not None and s.joins > 0 and s.keep < UNLIMITED for s in segments], dtype=bool)
        return self.policy.gates or self.policy.data_dependent

    def _is_ragged(self, segment: Segment | None) -> bool:
        return segment is not None and segment.prompt and self.policy.ragged

    def _budgets(
        self, shares: list[np.ndarray], segments: Sequence[Segment | None], totals: Sequence[int]
    ) -> list[Budgets]:
        key = [s and (s.keep, s.recent, s.prompt) for s in segments]
        steady = self._steady or all(s is None or s.keep >= UNLIMITED for s in segments)
        if steady and self._known[0] == key and self._known[1] is shares:
            return self._known[2]
        rows = len(segments)
        keeps = [np.full((layers, rows, heads), UNLIMITED, dtype=np.int64) for layers, heads in self._shapes]
        for row, segment in enumerate(segments):
            if segment is None:
                continue
            wanted = head_budgets(self.policy, segment, totals[row], self._heads)
            for (c, i), heads in zip(self._places, wanted, strict=True):
                keeps[c][i, row] = np.minimum(heads, UNLIMITED)
        # Heads go on with what they were dealt, but for another prompt, which deals again.
        goes_on = np.array([not self._is_ragged(s) for s in segments])[None, :, None]
        found = []
        for keep, share, windows in zip(keeps, shares, self._windows, strict=True):
            if self.policy.shares_layers:
                limit = np.full_like(keep, UNLIMITED)
            else:
                limit = keep = np.where((share >= 0) & goes_on & (keep < UNLIMITED), share, keep)
            found.append(Budgets(keep, limit, np.minimum(limit, windows)))
        self._known = (key if steady else None, shares, found)
        return found
