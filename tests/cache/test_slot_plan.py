"""The slot arithmetic against lists of tokens: random policies and calls, ragged rows, windows, many steps."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvrewrite.cache import slot_plan
from kvrewrite.cache.slot_plan import (
    ClassPlan,
    Rules,
    SlotPlanner,
    StepPlan,
    pages_of,
    prompt_slots,
    slots_decoded,
    walk,
)
from kvrewrite.ir.layout import PAGE
from kvrewrite.policies import UNLIMITED, Policy, RowState, Segment, make
from tests.support.slow_cache import SlowSlots

LAYERS = 4
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("full", {"chunk": 7}),
    ("h2o", {"budget": 12}),
    ("h2o", {"budget": 90, "chunk": 40}),
    ("streaming_llm", {"budget": 11, "chunk": 5, "start": 3}),
    ("tova", {"budget": 0.4, "chunk": 16}),
    ("h2o", {"budget": 30, "layer_budgets": "pyramid"}),
    ("tova", {"budget": 20, "layer_budgets": "24,16,9,70", "chunk": 10}),
    ("snapkv", {"budget": 16, "window": 6}),
    ("pyramidkv", {"budget": 40, "window": 6}),
    ("locret", {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3}),
    ("locret", {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3, "decode_eviction": True}),
    ("duo_attention", {"budget": 16, "start": 4, "heads": "10,01,11,00"}),
    ("adakv", {"budget": 16, "window": 6, "kernel": 3}),
    ("h2o", {"budget": 16, "head_budgets": "adakv", "chunk": 24}),
    ("attention_gate", {"chunk": 20, "budget": 30, "decode_eviction": True}),
    ("kvzap", {"threshold": 0.0, "window": 6}),
    ("h2o", {"budget": 30, "quantize": "int8", "quantize_group": 4, "quantize_residual": 8}),
]  # fmt: skip
IDS = [name + "".join(f"-{v}" for v in options.values()) for name, options in POLICIES]


@dataclass
class Class:
    """What the planner is told of a class."""

    layers: list[int]
    kv_heads: int
    windows: np.ndarray
    bound: np.ndarray


class Request:
    """Rows of slow heads beside what is planned for them."""

    def __init__(self, policy: Policy, windows: list[int], rows: int, seed: int):
        self.policy, self.random = policy, np.random.default_rng(seed)
        self.rules = Rules(tail=policy.quantize_residual if policy.quantize != "none" else 0)
        # Two classes whose layers alternate; the heads of a class are alike.
        self.classes = []
        for c, heads in enumerate((2, 2 if policy.name == "duo_attention" else 3)):
            layers = list(range(c, LAYERS, 2))
            bound = np.zeros((len(layers), rows, heads), dtype=np.int64)
            self.classes.append(Class(layers, heads, np.array([windows[n] for n in layers]), bound))
        self.heads = [
            [[SlowSlots(self.random) for _ in range(c.kv_heads)] for c in self._of_layers()] for _ in range(rows)
        ]
        self.shares = [np.full_like(c.bound, -1) for c in self.classes]
        self.dealt = np.full((rows, LAYERS, 3), -1)  # as `shares`, by the slow rule
        self.planner = SlotPlanner(policy, self.rules, self.classes)
        self.seen, self.generated, self.prompts = [0] * rows, [0] * rows, 0

    def _of_layers(self) -> list[Class]:
        return [self.classes[layer % 2] for layer in range(LAYERS)]

    def held(self, row: int) -> int:
        return max(len(head.tokens) for layer in self.heads[row] for head in layer)

    def call(self, counts: list[int]) -> None:
        """New tokens of each row, cut as the policy says."""
        plans: list[list[Segment]] = []
        for row, n in enumerate(counts):
            state = RowState(self.seen[row], self.generated[row], self.held(row))
            decodes = n == 1 and self.seen[row] > 0
            plans.append([self.policy.decode_segment(state)] if decodes else self.policy.plan(n, state) if n else [])
        totals = [seen + n for seen, n in zip(self.seen, counts)]
        for step in range(max(map(len, plans))):
            self.step([p[step] if step < len(p) else None for p in plans], totals)

    def step(self, segments: list[Segment | None], totals: list[int]) -> None:
        before = [[c.bound.copy() for c in self.classes], [s.copy() for s in self.shares]]
        plan = self.planner.plan(self.classes, self.shares, segments, totals)
        again = SlotPlanner(self.policy, self.rules, self.classes).plan(self.classes, self.shares, segments, totals)
        for mine, fresh in zip(plan.classes, again.classes):  # budgets that are remembered are those that are made anew
            assert np.array_equal(mine.budgets.keep, fresh.budgets.keep) and np.array_equal(mine.after, fresh.after)
        slots = [[[list(h.tokens) for h in layer] for layer in row] for row in self.heads]
        for row, segment in enumerate(segments):
            if segment is not None:
                self.run(row, segment, totals[row])
        for got, expected in zip((*[c.bound for c in self.classes], *self.shares), (*before[0], *before[1])):
            assert np.array_equal(got, expected)  # planning changes nothing
        self.check(plan, slots)
        self.commit(plan)

    def run(self, row: int, segment: Segment, total: int) -> None:
        """The slow rule of one row's segment."""
        policy, random = self.policy, self.random
        self.prompts += segment.prompt
        for layer, keep in enumerate(policy.layer_keeps(segment, total, LAYERS)):
            of_class, heads = self._of_layers()[layer], self.heads[row][layer]
            window = int(of_class.windows[layer // 2]) or UNLIMITED
            budgets = policy.head_keeps(keep, layer, of_class.kv_heads)
            for head in heads:
                head.add(segment.length)
            lengths = [len(head.tokens) for head in heads]
            goes = any(n > min(b, window) for n, b in zip(lengths, budgets))
            if policy.ragged and segment.prompt:
                if policy.head_budgets == "equal":  # flags or thresholds: any number up to the budget
                    budgets = [int(random.integers(1, min(n, b) + 1)) for n, b in zip(lengths, budgets)]
                elif goes:  # heads compete
                    left = min(sum(budgets), sum(lengths))
                    while sum(lengths) > left:
                        lengths[int(np.argmax(random.random(len(lengths)) * (np.array(lengths) > 1)))] -= 1
                    budgets = lengths
                for head, budget in zip(heads, budgets):
                    head.keep(budget)
                    head.slide(window)
                if goes and policy.head_budgets != "equal":
                    self.dealt[row, layer, : len(heads)] = [len(head.tokens) for head in heads]
                elif keep < UNLIMITED:
                    self.dealt[row, layer] = -1
            else:
                if keep < UNLIMITED:
                    dealt = self.dealt[row, layer]
                    budgets = [int(d) if d >= 0 else b for d, b in zip(dealt, budgets)]
                if policy.data_dependent:
                    budgets = [int(random.integers(1, min(n, b) + 1)) for n, b in zip(lengths, budgets)]
                for head, budget in zip(heads, budgets):
                    head.keep(budget)
                    head.slide(window)
        self.seen[row] += segment.length
        self.generated[row] = 0 if segment.prompt else self.generated[row] + 1

    def places(self, part: ClassPlan, c: int) -> Any:
        """Layer in the class, row, head, and the slow head of each."""
        for i, row, h in np.ndindex(*part.after.shape):
            yield (i, row, h), self.heads[row][self.classes[c].layers[i]][h]

    def check(self, plan: StepPlan, slots: list[Any]) -> None:
        for c, part in enumerate(plan.classes):
            first, during = part.first_written, part.during
            for at, head in self.places(part, c):
                i, row, h = at
                old, n = slots[row][self.classes[c].layers[i]][h], len(head.tokens)
                if part.deals[row]:
                    assert n <= part.dealt_most and first[at] == UNLIMITED and during[at] == part.bound[at]
                    continue
                assert n <= part.after[at] if plan.loose else n == part.after[at]
                assert during[at] == max(part.bound[at], part.after[at])
                if plan.segments[row] is None:
                    assert n == len(old) and first[at] == UNLIMITED
                    continue
                assert first[at] <= max(0, head.first_changed(old) - self.rules.tail)
                if n == len(old) + plan.tokens[row] and not plan.loose and not self.classes[c].windows[i]:
                    assert first[at] == max(
                        0, len(old) - self.rules.tail
                    )  # where tokens only join, no page is copied in vain
            for i, row in zip(*np.nonzero(np.broadcast_to(part.deals, part.after.shape[:2]))):
                heads = self.heads[row][self.classes[c].layers[i]]
                assert sum(len(head.tokens) for head in heads) <= part.dealt_slots[i, row]

    def commit(self, plan: StepPlan) -> None:
        """As a cache does it: the device is asked where pages were dealt out."""
        shares = []
        for c, part in enumerate(plan.classes):
            lengths = np.zeros_like(part.after)
            for at, head in self.places(part, c):
                lengths[at] = len(head.tokens)
            after = np.where(part.deals[None, :, None], lengths, part.after)
            assert np.array_equal(part.with_dealt(part.after, lengths), after)
            competes = part.deals.any() and self.policy.head_budgets != "equal"
            shares.append(part.next_shares(self.shares[c], lengths if competes else None))
            self.classes[c].bound = lengths if plan.loose else after
            for at, _ in self.places(part, c):
                i, row, h = at
                assert shares[c][at] == self.dealt[row, self.classes[c].layers[i], h]
        if plan.ragged:
            self.shares = shares


@pytest.mark.parametrize("windows", [[0] * LAYERS, [0, 10, 0, 10], [9, 20, 9, 20]], ids=["full", "mixed", "windows"])
@pytest.mark.parametrize(("name", "options"), POLICIES, ids=IDS)
def test_against_lists(name: str, options: dict[str, Any], windows: list[int]) -> None:
    """Ten calls of one to three rows: prompts, single tokens, rows that pause."""
    for seed in range(3):
        random = np.random.default_rng(seed)
        rows = 1 + seed
        request = Request(make(name, **options), windows, rows, seed)
        request.call([int(random.integers(1, 90)) for _ in range(rows)])
        for kinds in (*random.choice([0, 1, 1, 1, 9, 70], size=(7, rows)), np.full(rows, 70), np.ones(rows)):
            if kinds.any():
                request.call([int(random.integers(2, n + 1)) if n > 1 else int(n) for n in kinds])
        assert request.prompts >= 2 * rows


def test_budgets_are_remembered_until_they_change() -> None:
    """The same arrays for token after token, others once heads were dealt other shares."""
    request = Request(make("h2o", budget=16, head_budgets="adakv"), [0] * LAYERS, 1, 0)

    def token() -> list[np.ndarray]:
        plan = request.planner.plan(request.classes, request.shares, [request.policy.decode_segment()], [99])
        return [part.budgets.keep for part in plan.classes]

    request.call([40])
    first = token()
    assert all(a is b for a, b in zip(first, token()))
    assert not (first[0] == 16).all() and (first[0].sum(-1) == 32).all()
    request.call([40])
    assert not np.array_equal(token()[0], first[0])


@pytest.mark.parametrize(("name", "options"), POLICIES, ids=IDS)
def test_prompts_without_a_cache(name: str, options: dict[str, Any]) -> None:
    """The walk through a prompt that the memory plan and the FLOP model make is what a cache plans, step by step."""
    policy, windows = make(name, **options), [0, 10, 0, 10]
    request = Request(policy, windows, 1, 0)
    heads = [c.kv_heads for c in request._of_layers()]
    segments = policy.plan(130)
    found = prompt_slots(policy, segments, heads, windows)
    for at in range(len(segments) + 1):
        held = [request.classes[layer % 2].bound[layer // 2, 0] for layer in range(LAYERS)]
        assert all(np.array_equal(a[at], b) for a, b in zip(found, held, strict=True)), at
        if at < len(segments):
            plan = request.planner.plan(request.classes, request.shares, [segments[at]], [130])
            for of_class, part in zip(request.classes, plan.classes):
                of_class.bound = part.after


def test_walk_is_the_longest_head() -> None:
    """Rows without windows whose heads are alike: the walk is what each head holds."""
    policy = make("streaming_llm", budget=11, chunk=5, start=3)
    segments = policy.plan(33, RowState(held=4))
    held, found = 4, list(walk(segments, 4))
    for segment, (during, after) in zip(segments, found, strict=True):
        assert during == held + segment.length
        held = min(held + segment.length, 11)
        assert after == held
    assert int(slots_decoded(11, 20, 11)) == 11 and int(slots_decoded(11, 20, UNLIMITED)) == 31
    assert int(slots_decoded(30, 5, 11)) == 30 and int(slots_decoded(11, 20, UNLIMITED, 16)) == 16


def test_pages() -> None:
    assert pages_of(np.array([0, 1, PAGE, PAGE + 1])).tolist() == [0, 1, 1, 2]


def test_no_torch() -> None:
    """Slots are planned on the host."""
    tree = ast.parse(Path(slot_plan.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert "numpy" in names and not [n for n in names if n.split(".")[0] in ("torch", "transformers")]
