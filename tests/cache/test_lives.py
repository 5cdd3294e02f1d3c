"""Lives of caches: turns, padded and paused rows, answers, pins, drops, forks, files, checkpoints and rows that are dealt anew,
in random order, compared with the oracle of tests/support/oracle.py after each event."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvrewrite
from kvrewrite.errors import CacheError
from tests.cache.test_cache import GREEDY
from tests.cache.test_spans import forget
from tests.policies import test_options as quantized
from tests.policies import test_policies as table
from tests.support.oracle import Layer, Moment, Oracle, Rule
from tests.support.oracle_rules import H2ORule, KeyDiffRule, SnapKVRule, StreamingRule, TovaRule
from tests.support.zoo import VOCAB

pytestmark = pytest.mark.xdist_group("policies")
ABOVE = 1e30
EVENTS = 14
ROWS = 4  # at most


class Life:
    """A cache, an oracle for each of its rows, and what happens to them."""

    def __init__(self, model: Any, oracle: Callable[[], Oracle], seed: int, folder: Path):
        self.model, self.new_oracle, self.folder = model, oracle, folder
        self.chance = np.random.default_rng(seed)
        rows = int(self.chance.integers(1, 3))
        self.cache, self.rows = model.new_cache(rows), [oracle() for _ in range(rows)]
        self.left: list[tuple[Any, list[Oracle]]] = []  # caches that were forked, which must stay as they are
        self.marks: list[tuple[int, list[Oracle]]] = []  # checkpoints
        self.before: list[tuple[int, list[Oracle]]] = []  # after each text since anything else happened
        self.told: list[str] = []

    def number(self, low: int, high: int) -> int:
        """From low to high - 1."""
        return int(self.chance.integers(low, high))

    def live(self, events: int) -> None:
        """Some events; then every cache that was left goes on, too."""
        kinds = [self.text, self.text, self.tokens, self.tokens, self.answer, self.pin, self.unpin, self.drop]
        kinds += [self.fork, self.file, self.mark, self.back, self.repeat, self.select, self.crop]
        self.text()
        for _ in range(events):
            kinds[self.number(0, len(kinds))]()
            self.check()
        for cache, rows in [*self.left, (self.cache, self.rows)]:
            self.cache, self.rows = cache, rows
            self.told.append("goes on")
            self.check()
            self.text()
            self.tokens()
            self.check()

    def check(self) -> None:
        """What is held, and what is pinned."""
        held = self.cache.positions()
        for b, oracle in enumerate(self.rows):
            assert {layer: heads[b] for layer, heads in held.items()} == oracle.kept(), (b, self.told)
            pinned = {
                p for spans in [self.cache.pins[b] if self.cache.pins else ()] for a, z in spans for p in range(a, z)
            }
            assert pinned == pins_of(oracle), (b, self.told)
        assert self.cache.seen == [oracle.seen for oracle in self.rows], self.told

    # -- texts ---------------------------------------------------------------------------------------------------------
    def columns(self, counts: list[int]) -> tuple[Tensor, Tensor]:
        """New ids and the mask of all columns: each row has its count of tokens, anywhere among the padding."""
        width = max(counts)
        ids = torch.from_numpy(self.chance.integers(0, VOCAB, (len(counts), width)))
        mask = torch.zeros(len(counts), width, dtype=torch.int64)
        side = self.number(0, 3)
        for b, n in enumerate(counts):
            at = [0, width - n][side] if side < 2 else sorted(self.chance.choice(width, n, replace=False))
            mask[b, slice(at, at + n) if side < 2 else at] = 1
        past = torch.from_numpy(self.cache.history.real(self.cache.columns)).long()
        return ids, torch.cat([past, mask], 1)

    def call(self, counts: list[int]) -> None:
        ids, mask = self.columns(counts)
        new = mask[:, -ids.shape[1] :].bool()
        try:
            got = self.model(ids, attention_mask=mask, cache=self.cache).logits
        except CacheError as error:
            assert "pinned tokens besides" in str(error), self.told
            self.told[-1] += " (no room)"
            return
        for b, oracle in enumerate(self.rows):
            if counts[b]:
                expected = read(oracle, ids[b, new[b]].tolist())
                torch.testing.assert_close(
                    got[b, new[b]].float(), expected.float(), rtol=0, atol=1e-4, msg=lambda m: f"{self.told}: {m}"
                )
        self.before.append((self.cache.columns, copied(self.rows)))

    def text(self) -> None:
        """A further prompt, of other lengths in each row; some rows have none."""
        counts = [self.number(2, 15) * (self.number(0, 4) > 0) for _ in self.rows]
        counts[self.number(0, len(counts))] = self.number(2, 22)
        self.told.append(f"text {counts}")
        self.cache.end_prompt()
        self.call(counts)
        self.cache.end_prompt()

    def tokens(self) -> None:
        """Single tokens; some rows pause."""
        if not self.cache.columns or not all(self.cache.seen):
            return
        for _ in range(self.number(1, 4)):
            counts = [int(self.number(0, 3) > 0) for _ in self.rows]
            if any(counts):
                self.told.append(f"tokens {counts}")
                self.call(counts)

    def answer(self) -> None:
        """`generate`, from texts of different lengths."""
        counts, new = [self.number(1, 9) for _ in self.rows], self.number(1, 5)
        self.told.append(f"answer to {counts} with {new}")
        ids, mask = self.columns(counts)
        whole = torch.cat([self.cache.ids(), ids], 1)
        real = mask[:, -ids.shape[1] :].bool()
        self.cache.end_prompt()
        before = self.cache.columns
        try:
            out = self.model.generate(whole, attention_mask=mask, cache=self.cache, max_new_tokens=new, **GREEDY)
        except CacheError as error:
            assert "pinned tokens besides" in str(error) and self.cache.columns == before, self.told
            self.told[-1] += " (no room)"
            return
        for b, oracle in enumerate(self.rows):
            logits = read(oracle, ids[b, real[b]].tolist())[-1]
            for n, token in enumerate(out[b, whole.shape[1] :].tolist()):
                assert float(logits.max() - logits[token]) < 1e-3, self.told
                if n < new - 1:
                    logits = oracle.decode(token)[-1]
        self.before.append((self.cache.columns, copied(self.rows)))

    # -- spans ---------------------------------------------------------------------------------------------------------
    def pin(self) -> None:
        """Some of what is held, or is to come; or of what is gone, which is refused."""
        b = self.number(0, len(self.rows))
        start = self.number(0, self.rows[b].seen + 2)
        span = range(start, start + self.number(1, 4))
        if len(pins_of(self.rows[b]) | set(span)) > 6:
            return
        self.told.append(f"pin {span} of {b}")
        heads = [set(head) for layer in self.rows[b].kept().values() for head in layer]
        if all(p >= self.rows[b].seen or all(p in head for head in heads) for p in span):
            self.cache.pin(span.start, span.stop, row=b)
            pins_of(self.rows[b]).update(span)
        else:
            with pytest.raises(CacheError, match="no longer held"):
                self.cache.pin(span.start, span.stop, row=b)
        self.before = []

    def unpin(self) -> None:
        b = self.number(0, len(self.rows))
        start = self.number(0, self.rows[b].seen + 1)
        self.told.append(f"unpin from {start} of {b}")
        self.cache.unpin(start, start + 4, row=b)
        pins_of(self.rows[b]).difference_update(range(start, start + 4))
        self.before = []

    def drop(self) -> None:
        b = self.number(0, len(self.rows))
        seen = self.rows[b].seen
        if not seen:
            return
        start = self.number(0, seen)
        end = min(seen, start + self.number(1, 9))
        self.told.append(f"drop {start} to {end} of {b}")
        self.cache.drop(start, end, row=b)
        forget(self.rows[b], [(start, end)])
        pins_of(self.rows[b]).difference_update(range(start, end))
        self.before = []

    # -- copies --------------------------------------------------------------------------------------------------------
    def fork(self) -> None:
        self.told.append("fork")
        if len(self.left) < 2:
            self.left.append((self.cache, copied(self.rows)))
        self.cache = self.cache.fork()

    def file(self) -> None:
        self.told.append("file")
        self.cache.save(self.folder / "cache", force=True)
        self.cache, self.marks = kvrewrite.load_cache(self.model, self.folder / "cache"), []

    def mark(self) -> None:
        self.told.append("mark")
        self.cache.checkpoint()
        kept = [m for m in self.marks if m[0] < self.cache.columns]
        self.marks = [*kept, (self.cache.columns, copied(self.rows))][-4:]

    def back(self) -> None:
        if not self.marks:
            return
        columns = self.number(self.marks[0][0], self.cache.columns + 1)
        self.told.append(f"back to {columns}")
        self.cache.roll_back(columns)
        self.marks = [m for m in self.marks if m[0] <= columns]
        self.rows, self.before = copied(self.marks[-1][1]), []

    def repeat(self) -> None:
        if 2 * len(self.rows) <= ROWS:
            self.told.append("repeat")
            self.cache.batch_repeat_interleave(2)
            self.rows = [row for b in range(len(self.rows)) for row in copied([self.rows[b]] * 2)]
            self.marks, self.before = [], []

    def select(self) -> None:
        source = [self.number(0, len(self.rows)) for _ in range(self.number(1, ROWS))]
        self.told.append(f"select {source}")
        self.cache.select(source)
        self.rows = [copied([self.rows[b]])[0] for b in source]
        self.marks, self.before = [], []

    def crop(self) -> None:
        """Back to where a text before began, or refused with nothing changed."""
        if len(self.before) < 2:
            return
        columns, rows = self.before[-2]
        self.told.append(f"crop to {columns}")
        try:
            self.cache.crop(columns - self.cache.columns)
        except CacheError:
            self.told[-1] += " (refused)"
            return
        self.rows, self.before = copied(rows), self.before[:-1]
        self.marks = [m for m in self.marks if m[0] <= columns]


def read(oracle: Oracle, ids: list[int]) -> Tensor:
    """The logits of a row's tokens, as a call gives them."""
    return oracle.decode(ids[0]) if len(ids) == 1 and oracle.seen else oracle.prompt(ids)


def copied(rows: list[Oracle]) -> list[Oracle]:
    return [copy.deepcopy(row, {id(x): x for x in (row.model, row.config)}) for row in rows]


def pins_of(oracle: Oracle) -> set[int]:
    """The pinned positions, to change."""
    rule: Any = getattr(oracle.rule, "rule", oracle.rule)
    found: set[int] = rule.pins
    return found


def pinnable(rule: Rule) -> Rule:
    """A rule under which the positions in `pins` come before all that is not protected."""
    base: Any = type(rule)

    class Pinnable(base):  # type: ignore[misc]
        def scores(self, layer: Layer, moment: Moment) -> Any:
            found = super().scores(layer, moment)
            return [
                [ABOVE if e.position in self.pins else x for e, x in zip(head, line, strict=True)]
                for head, line in zip(layer.heads, found, strict=True)
            ]

    found: Any = object.__new__(Pinnable)
    found.__dict__.update(copy.deepcopy(rule.__dict__), pins=set())
    return found


# name: policy, its options, the oracle's rule, and how it is quantized (kind, residual)
CASES: dict[str, tuple[str, dict[str, Any], Rule, tuple[str, int] | None]] = {
    "full": ("full", {"chunk": 7}, Rule(), None),
    "h2o": ("h2o", {"budget": 20, "recent_tokens": 3}, H2ORule(budget=20, recent=3), None),
    "h2o in chunks, contiguous": (
        "h2o",
        {"budget": 20, "recent_tokens": 3, "chunk": 8, "positions": "contiguous"},
        H2ORule(budget=20, recent=3, chunk=8, contiguous=True),
        None,
    ),
    "heads": (
        "h2o",
        {"budget": 20, "recent_tokens": 3, "head_budgets": "adakv", "head_floor": 0.5},
        H2ORule(budget=20, recent=3, head_budgets="adakv", head_floor=0.5),
        None,
    ),
    "streaming": (
        "streaming_llm",
        {"budget": 20, "start": 3, "chunk": 7},
        StreamingRule(budget=20, sinks=3, chunk=7),
        None,
    ),
    "snapkv": (
        "snapkv",
        {"budget": 18, "window": 4},
        SnapKVRule(budget=18, recent=4, first_prompt_only=True),
        None,
    ),
    "keydiff": ("keydiff", {"budget": 20, "chunk": 9}, KeyDiffRule(budget=20, chunk=9), None),
    "tova": ("tova", {"budget": 20, "chunk": 9}, TovaRule(budget=20, chunk=9), None),
    "full in int8": ("full", {"chunk": None}, Rule(), ("int8", 8)),
    "h2o in int4, contiguous": (
        "h2o",
        {"budget": 22, "recent_tokens": 3, "positions": "contiguous"},
        H2ORule(budget=22, recent=3, contiguous=True),
        ("int4", 4),
    ),
    "snapkv in fp8": (
        "snapkv",
        {"budget": 18, "window": 4},
        SnapKVRule(budget=18, recent=4, first_prompt_only=True),
        ("fp8", 4),
    ),
    "heads in int4": (
        "h2o",
        {"budget": 22, "recent_tokens": 3, "head_budgets": "adakv", "head_floor": 0.5},
        H2ORule(budget=22, recent=3, head_budgets="adakv", head_floor=0.5),
        ("int4", 4),
    ),
}
DAILY = {
    ("h2o in chunks, contiguous", 0),
    ("heads", 1),
    ("streaming", 2),
    ("h2o in int4, contiguous", 3),
    ("snapkv in fp8", 1),
}


@pytest.mark.filterwarnings("ignore:.*stay in full precision")
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=() if (name, seed) in DAILY else pytest.mark.thorough)
        for name in CASES
        for seed in range(6)
    ],
)
def test_a_life(name: str, seed: int, tmp_path: Path) -> None:
    policy, options, rule, how = CASES[name]
    if how is None:
        model = table.rewritten(policy, **options)
    else:
        given = {"quantize": how[0], "quantize_group": 4, "quantize_residual": how[1], **options}
        model = quantized.rewritten(policy, torch.float64, **given)

    def oracle() -> Oracle:
        mine = pinnable(rule)
        if how is None:
            return Oracle(table.llama(), mine)
        return Oracle(quantized.llama(torch.float64), quantized.Quantizing(mine, how[0], 4, how[1]))

    Life(model, oracle, seed, tmp_path).live(EVENTS)
