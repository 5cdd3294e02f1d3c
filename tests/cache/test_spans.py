"""Pinned spans stay whatever the policy says, and dropped spans go: against the oracle of tests/support/oracle.py."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvrewrite
from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.spans import joined, without
from kvrewrite.errors import CacheError, InputError
from kvrewrite.ir.layout import PIN_SPANS
from kvrewrite.policies import POLICIES
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.cache.test_fork import CASES as FORKED
from tests.policies import test_options as quantized
from tests.policies import test_policies as table
from tests.support import kinds
from tests.support.learned import DuoRule
from tests.support.oracle import Entry, Layer, Moment, Oracle, Rule, rotate
from tests.support.oracle_rules import H2ORule, KeyDiffRule
from tests.support.products import covering, daily, few
from tests.support.rewritten import build, captured, rewrite, rewritten

pytestmark = pytest.mark.xdist_group("policies")
ABOVE = 1e30  # more than any score


def pinned_rule(rule: Rule, pins: set[int]) -> Rule:
    """A rule under which these positions come before all that is not protected, and that are never flagged."""
    base: Any = type(rule)

    class Pinned(base):  # type: ignore[misc]
        def flags(self, layer: Layer, moment: Moment) -> Any:
            found = super().flags(layer, moment)
            if found is None:
                return None
            first = moment.seen - len(found[0])
            return [[f and first + t not in pins for t, f in enumerate(head)] for head in found]

        def arrive(self, layer: Layer, count: int) -> None:
            super().arrive(layer, count)
            for head in layer.heads:
                for e in head[len(head) - count :]:
                    e.score = ABOVE if e.position in pins else e.score

        def look(self, layer: Layer, places: range, queries: range) -> None:
            """KVzip: when the prompt is repeated."""
            super().look(layer, places, queries)
            for head in layer.heads:
                for e in head:
                    e.score = ABOVE if e.position in pins else e.score

        def scores(self, layer: Layer, moment: Moment) -> Any:
            found = super().scores(layer, moment)
            return [
                [ABOVE if e.position in pins else x for e, x in zip(head, line, strict=True)]
                for head, line in zip(layer.heads, found, strict=True)
            ]

        def first(self, newest: list[Entry], rest: list[Entry], slots: int) -> list[Entry]:
            """NACL: what is pinned comes before all but the newest; a token is there once."""
            there = {e.position for e in newest}
            ordered = sorted(rest, key=lambda e: e.position not in pins)  # stable
            return [*newest, *(e for e in ordered if e.position not in there)][:slots]

    found = object.__new__(Pinned)
    found.__dict__.update(rule.__dict__)
    return found


def follow(case: tuple[str, dict[str, Any], Rule], calls: tuple[int, ...], pins: list[list[tuple[int, int]]]) -> None:
    """Calls of these widths on a cache with pinned spans, compared after each."""
    policy, options, rule = case
    model = table.rewritten(policy, **options)
    ids = table.tokens(len(pins), sum(calls), 5)
    cache, at, rows = model.new_cache(len(pins)), 0, []
    for row, spans in enumerate(pins):
        for span in spans:
            cache.pin(*span, row=row)
        rows.append(Oracle(table.llama(), pinned_rule(rule, {p for a, b in spans for p in range(a, b)})))
    for i, width in enumerate(calls):
        table.compare(model, cache, rows, ids[:, at : at + width], f"call {i} of {width} tokens at {at}")
        cache.end_prompt()
        at += width
        for row, spans in enumerate(pins):
            held = {p for a, b in spans for p in range(a, b) if p < at}
            assert all(held <= set(head) for layer in cache.positions().values() for head in layer[row])


@functools.cache
def pinned() -> set[str]:
    """The policies whose pinned spans are compared every day."""
    return {CASES[case["name"]][0] for case in daily(test_pinned_against_oracle)}


PINS = [[(6, 8)], [(3, 4), (9, 10)]]
# Their budgets have no room for two more tokens beside what the policy protects.
FULL = {
    "h2o pyramid",
    "h2o heads",
    "locret heads, eviction in decoding",
    "locret heads and layers",
    "adakv pyramid",
    "keydiff heads",
    "qfilters, heads",
    "knorm pyramid",
    "fast_kvzip, by layer",
    "nacl pyramid",
}
# But InfLLM's, which refuses both (tests/policies/test_infllm.py).
CASES: dict[str, tuple[str, dict[str, Any], Rule]] = {
    **{n: c for n, c in table.CASES.items() if not isinstance(c[2], DuoRule) and not POLICIES[c[0]].recalls},
    "h2o heads, with room": (
        "h2o",
        {"budget": 13, "recent_tokens": 3, "head_budgets": "adakv"},
        H2ORule(budget=13, recent=3, head_budgets="adakv"),
    ),
    "keydiff heads, no floor": (
        "keydiff",
        {"budget": 9, "recent_tokens": 2, "head_budgets": "adakv", "head_floor": 0.0},
        KeyDiffRule(budget=9, recent=2, head_budgets="adakv", head_floor=0.0),
    ),
}
WIDTHS = (23, *[1] * 9, 9, 1, 1, 1)


# Each way to evict; what has one policy here in the default tier has another one in the test of dropped spans, where it can.
KIND: dict[str, Any] = {
    "kind": lambda case: kinds.eviction(*CASES[case["name"]][:2]),
    "positions": lambda case: kinds.positions(*CASES[case["name"]][:2]),
}


@covering({"kind": 1, "positions": 1, "name": 0}, derived=KIND)
@pytest.mark.parametrize("name", [name for name in CASES if name not in FULL])
def test_pinned_against_oracle(name: str) -> None:
    """Two rows with spans of their own: a prompt, an answer, a further prompt and its answer."""
    follow(CASES[name], WIDTHS, PINS)


@pytest.mark.parametrize(
    "name", sorted(FULL - {"h2o pyramid", "nacl pyramid", "adakv pyramid", "locret heads and layers"})
)
def test_no_room_is_said_before_anything_happens(name: str) -> None:
    policy, options, _ = CASES[name]
    model = table.rewritten(policy, **options)
    cache, at, ids = model.new_cache(1), 0, table.tokens(1, sum(WIDTHS), 5)
    cache.pin(4, 8)
    for width in WIDTHS:
        before, columns = cache.positions(), cache.columns
        try:
            model(ids[:, at : at + width], cache=cache)
        except CacheError as error:
            assert "pinned tokens besides" in str(error) and "keeps" in str(error)
            break
        cache.end_prompt()
        at += width
    else:
        pytest.fail("there was room")
    assert cache.positions() == before and cache.columns == columns
    cache.unpin()
    model(ids[:, at : at + width], cache=cache)


# ---------------------------------------------------------------------------------------------------------- dropped spans
def forget(oracle: Oracle, spans: list[tuple[int, int]]) -> None:
    """The oracle's heads without a span."""
    gone = {p for a, b in spans for p in range(a, b)}
    for layer in oracle.layers:
        layer.heads = [[e for e in head if e.position not in gone] for head in layer.heads]
        for head, slow in zip(layer.heads, getattr(layer, "slow", ())):
            slow.step([e.position for e in head], {})
            for e in head:
                key = torch.tensor(slow.keys[e.position], dtype=torch.float64)
                e.key = key if oracle.rule.contiguous else rotate(key[None], [-e.place], layer.theta)[0]
                e.value = torch.tensor(slow.values[e.position], dtype=torch.float64)


# Heads that compete keep the slots that they were dealt; a rule asks for those of the head as it is.
@covering(
    {"kind": 1, "positions": 1, "name": 0}, derived=KIND, prefer=lambda case: CASES[case["name"]][0] not in pinned()
)
@pytest.mark.parametrize("name", CASES)
def test_dropped_against_oracle(name: str) -> None:
    """A span goes out of one row of two after its prompt, another while it is answered, from both at once."""
    policy, options, rule = CASES[name]
    model = table.rewritten(policy, **options)
    ids, at = table.tokens(2, sum(WIDTHS), 6), 0
    cache, rows = model.new_cache(2), [Oracle(table.llama(), rule) for _ in ids]
    for i, width in enumerate(WIDTHS):
        table.compare(model, cache, rows, ids[:, at : at + width], f"call {i} of {width} tokens at {at}")
        cache.end_prompt()
        at += width
        if i == 0:
            cache.drop(15, 21, row=1)
            forget(rows[1], [(15, 21)])
        if i == 4:
            cache.drop(0, 2)
            cache.drop(20, at)
            for row in rows:
                forget(row, [(0, 2), (20, at)])
        for row, oracle in enumerate(rows):
            assert {layer: heads[row] for layer, heads in cache.positions().items()} == oracle.kept()
        check_lengths(cache)


def check_lengths(cache: EvictionCache) -> None:
    """Pages are as many as slots need, each where the table says."""
    if not cache._policy.ragged:
        check_pages(cache)
    for lease in cache.leases:
        assert (lease.lens.numpy() <= lease.bound).all()


@pytest.mark.filterwarnings("ignore:.*stay in full precision")
@pytest.mark.parametrize("name", few(quantized.QUANTIZED, rest=("h2o in chunks", "merging", "full")))
def test_quantized_against_oracle(name: str) -> None:
    """Codes stay where they are, groups widen, tails move up: what is stored after drops, with a pinned span, in fp64."""
    kind, residual, policy, options, rule = quantized.QUANTIZED[name]
    if "head_budgets" in options:
        options, rule = {**options, "budget": 22}, H2ORule(budget=22, recent=2, head_budgets="adakv")
    given = {"quantize": kind, "quantize_group": 4, "quantize_residual": residual, **options}
    model = quantized.rewritten(policy, torch.float64, **given)
    ids, at = quantized.tokens(1, 56, 3), 0
    rule = pinned_rule(rule, {5, 6}) if not isinstance(rule, quantized.Merging) else rule
    oracle = Oracle(quantized.llama(torch.float64), quantized.Quantizing(rule, kind, 4, residual))
    cache = model.new_cache(1)
    if not isinstance(rule, quantized.Merging):
        cache.pin(5, 7)
    for i, width in enumerate((27, 1, 1, 1, 1, 1, 1, 14, 1, 1, 1)):
        call = ids[:, at : at + width]
        at += width
        got = model(call, past_key_values=cache).logits
        row = call[0].tolist()
        expected = oracle.decode(row[0]) if width == 1 else oracle.prompt(row)
        assert {layer: heads[0] for layer, heads in cache.positions().items()} == oracle.kept(), i
        torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-4)
        if i in (0, 3, 7):
            span = {0: (18, 24), 3: (0, 3), 7: (30, 40)}[i]
            cache.drop(*span)
            forget(oracle, [span])
            assert {layer: heads[0] for layer, heads in cache.positions().items()} == oracle.kept()


# ------------------------------------------------------------------------------------------------------------- the surface
def test_pages_come_back() -> None:
    model = rewritten("llama", "full")
    cache = model.prefill(tokens(1, 64 * 4))
    twin, before = cache.fork(), cache.memory()
    cache.drop(10, 10 + 64 * 2)
    assert cache.memory().leased == before.leased // 2 and twin.memory().leased == before.leased
    assert twin.positions()[0][0][0] == list(range(256)) and cache.positions()[0][0][0] == [
        *range(10),
        *range(138, 256),
    ]
    check_pages(cache, twin)
    assert cache.seen == [256] and cache.columns == 256
    text = torch.cat([cache.ids(), tokens(1, 3, seed=1)], 1)
    assert model.generate(text, cache=cache, max_new_tokens=3, **GREEDY).shape == (1, 262)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        pytest.param(
            *case, marks=[pytest.mark.thorough] * (case[0] in ("kvzap", "streaming_llm") or "head_budgets" in case[1])
        )
        for case in FORKED
        if case[0] in ("h2o", "streaming_llm", "kvzap", "adakv")
    ],
)
def test_static_buffers_keep_what_is_pinned(policy: str, options: dict[str, Any]) -> None:
    """The step with pins is captured by itself; both hold the same as op by op, and so do tokens after a drop."""
    plain = rewritten("llama", policy, **options)
    model = rewrite(build("llama"), captured("llama"), policy, None, **options)
    model.compile(static_decode=True, backend="eager")
    caches = [m.new_cache(1) for m in (plain, model)]
    for cache in caches:
        cache.pin(10, 30)
    steps = [tokens(1, 120), *(tokens(1, 1, seed=t) for t in range(5))]
    for i, ids in enumerate([*steps, *steps[1:]]):
        logits = [m(ids, cache=cache).logits for m, cache in zip((plain, model), caches)]
        torch.testing.assert_close(*logits, rtol=0, atol=2e-5)
        assert caches[0].positions() == caches[1].positions()
        if i == 5:
            for cache in caches:
                cache.end_prompt()
                cache.drop(12, 20)
    assert model.pinning().decoder is not None


def test_pin_of_prefill_and_generate() -> None:
    """Spans and masks, padded rows, forks, rows that are repeated, and saved."""
    model = rewritten("llama", "h2o", budget=40)
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.int64)
    mask[0, :7] = 0
    pin = torch.zeros(2, 90, dtype=torch.bool)
    pin[:, 2:12] = True
    cache = model.prefill(ids, mask, pin=pin)
    assert cache.pins == [((0, 5),), ((2, 12),)]

    def held(cache: EvictionCache, row: int, start: int, end: int) -> bool:
        return all(set(range(start, end)) <= set(h) for layer in cache.positions().values() for h in layer[row])

    assert held(cache, 0, 0, 5) and held(cache, 1, 2, 12)
    fork = cache.fork()
    fork.unpin(row=0)
    assert fork.pins == [(), ((2, 12),)] and cache.pins[0] == ((0, 5),)
    fork.select([1, 1, 0])
    assert fork.pins == [((2, 12),), ((2, 12),), ()]
    out = model.generate(ids[:1], pin=(3, 9), max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    (after,) = (v for k, v in out.items() if k in ("cache", "past_key_values"))
    assert after.pins == [((3, 9),)] and held(after, 0, 3, 9)
    more = torch.cat([out.sequences, tokens(1, 30, seed=3)], 1)
    chosen = torch.zeros_like(more, dtype=torch.bool)
    chosen[0, 100:105] = True
    model.generate(more, cache=after, pin=chosen, max_new_tokens=20, **GREEDY)
    assert held(after, 0, 3, 9) and held(after, 0, 100, 105)


def test_pins_are_saved(tmp_path: Path) -> None:
    model = rewritten("llama", "h2o", budget=40)
    cache = model.prefill(tokens(1, 90), pin=[(3, 9), (20, 22)])
    cache.save(tmp_path / "a")
    loaded = kvrewrite.load_cache(model, tmp_path / "a")
    question = tokens(1, 30, seed=4)
    assert loaded.pins == cache.pins == [((3, 9), (20, 22))]
    assert torch.equal(model(question, cache=loaded).logits, model(question, cache=cache).logits)
    assert loaded.positions() == cache.positions()


def test_a_model_without_pins_stays_as_it_is() -> None:
    """The copy with pins is made for caches that have some; deep copies and compiled models make their own."""
    model = rewrite(build("llama"), captured("llama"), "h2o", None, budget=40)
    model.prefill(tokens(1, 60))
    assert model.__dict__.get("_pinning") is None
    names = [n.target for n in model.graph_module.graph.nodes]
    model.prefill(tokens(1, 60), pin=(3, 5))
    view = model.pinning()
    assert view.owner is model.owner and view is model.pinning()
    assert (
        [n.target for n in model.graph_module.graph.nodes] == names != [n.target for n in view.graph_module.graph.nodes]
    )
    mine, theirs = (dict(m.named_parameters()) for m in (model, view))
    assert {id(p) for p in theirs.values()} <= {id(p) for p in mine.values()}
    assert copy.deepcopy(model).__dict__.get("_pinning") is None


def test_heads_with_windows_of_their_own() -> None:
    """DuoAttention: a streaming head keeps as many slots as ever, pinned ones among them."""
    model = rewritten("llama", "duo_attention", budget=90, heads="10,01")
    ids = tokens(1, 200)
    cache, plain = model.prefill(ids, pin=(71, 79)), model.prefill(ids)
    for layer, heads in cache.positions().items():
        for got, usual in zip(heads[0], plain.positions()[layer][0]):
            assert len(got) == len(usual) and set(range(71, 79)) <= set(got)
    assert any(not set(range(71, 79)) <= set(h) for layer in plain.positions().values() for h in layer[0])


def test_what_is_refused() -> None:
    model = rewritten("llama", "h2o", budget=40)
    cache = model.prefill(tokens(2, 90))
    gone = min(set(range(90)) - set(cache.positions()[0][0][0]))
    with pytest.raises(CacheError, match=rf"row 0: 1 of the tokens {gone} to {gone} are no longer held"):
        cache.pin(gone, gone + 1, row=0)
    for span in ((3, 3), (-1, 4), (5, 2), (1.0, 3)):
        with pytest.raises(InputError, match="expected whole numbers, 0 <= start < end"):
            cache.pin(*span)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="row is 2, expected a number from 0 to 1"):
        cache.pin(1, 2, row=2)
    with pytest.raises(CacheError, match="got the span 80 to 91"):
        cache.drop(80, 91)
    empty = model.new_cache(1)
    with pytest.raises(
        CacheError, match=f"{PIN_SPANS + 1} spans of a row would be pinned, expected at most {PIN_SPANS}"
    ):
        for i in range(PIN_SPANS + 1):
            empty.pin(3 * i, 3 * i + 1)
    for pin, message in (("x", "expected .start, end."), (torch.ones(1, 9, dtype=torch.bool), "as large as input_ids")):
        with pytest.raises(InputError, match=message):
            model.prefill(tokens(1, 60), pin=pin)


def test_span_arithmetic() -> None:
    """Against sets of numbers."""
    chance = np.random.default_rng(0)
    for _ in range(200):
        spans = [(int(a), int(a + n)) for a, n in zip(chance.integers(0, 20, 3), chance.integers(1, 5, 3))]
        inside = {p for a, b in spans for p in range(a, b)}
        start, end = 5, int(chance.integers(6, 15))
        found = joined(spans)
        assert {p for a, b in found for p in range(a, b)} == inside
        assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
        rest = without(found, start, end)
        assert {p for a, b in rest for p in range(a, b)} == inside - set(range(start, end))
