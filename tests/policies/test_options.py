"""Options that every policy has: merging what is evicted, and quantized caches."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvrewrite
from kvrewrite import policies
from kvrewrite.analysis.memory import plan_memory
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import OptionError
from kvrewrite.ir.layout import Quantize
from kvrewrite.passes.pipeline import canonical
from kvrewrite.verification import verify
from tests.support.oracle import Entry, Layer, Moment, Oracle, Rule, rotate
from tests.support.oracle_rules import H2ORule, KeyDiffRule, ScissorhandsRule, SnapKVRule
from tests.support.products import few
from tests.support.rewritten import rewrite
from tests.support.rewritten import rewritten as shared_rewritten
from tests.support.slow_cache import SlowHead
from tests.support.zoo import VOCAB, make

pytestmark = pytest.mark.xdist_group("options")
LAYERS = 2


@functools.cache
def llama(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> nn.Module:
    """Two layers, two kv heads, attention that prefers some tokens clearly."""
    model = make("llama", num_hidden_layers=layers, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return model.to(dtype)


@functools.cache
def captured(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Captured:
    found = capture(llama(dtype, layers))
    canonical(found)
    return found


@functools.cache
def rewritten(policy: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return rewrite(llama(dtype), captured(dtype), policy, None, **options)


def tokens(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCAB, generator=generator)[:length] for _ in range(rows)])


# ------------------------------------------------------------------------------------------------ merging
class Merging(Rule):
    """What a rule drops is merged into what it keeps: D2O, entry by entry, in fp64."""

    def __init__(self, rule: Any):
        self.rule, self.contiguous = rule, rule.contiguous
        for name in ("cut", "turn", "flags", "arrive", "renews"):
            setattr(self, name, getattr(rule, name))

    def cached_key(self, layer: Layer, entry: Entry) -> Tensor:
        """As the cache has it: rotated by the position in the text, or not rotated at all."""
        return entry.key if self.contiguous else layer.rotated(entry)

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        kept = self.rule.keep(layer, moment)
        found: list[list[tuple[Entry, Entry, float]]] = []  # head -> dropped entry, where it goes, similarity
        for entries, stays in zip(layer.heads, kept):
            mine = []
            for e in [e for e in entries if not any(e is s for s in stays)]:
                key = self.cached_key(layer, e)
                near = [float(torch.cosine_similarity(key, self.cached_key(layer, s), dim=0)) for s in stays]
                best = max(range(len(stays)), key=lambda n: near[n])
                mine.append((e, stays[best], near[best]))
            found.append(mine)
        every = [u for mine in found for _, _, u in mine]
        if not every:
            return kept
        mean, before = sum(every) / len(every), getattr(layer, "threshold", math.nan)
        layer.threshold = mean if math.isnan(before) else (before + mean) / 2  # type: ignore[attr-defined]
        into: dict[int, list[tuple[Entry, Entry, float]]] = {}
        for i in range(max(map(len, found))):
            ith = [mine[i] for mine in found if i < len(mine)]
            if sum(u for _, _, u in ith) / len(ith) >= layer.threshold:  # type: ignore[attr-defined]
                for move in ith:
                    into.setdefault(id(move[1]), []).append(move)
        merged = []
        for moves in into.values():
            slot = moves[0][1]
            key = self.cached_key(layer, slot) + sum(u * self.cached_key(layer, e) for e, _, u in moves)
            value = slot.value + sum(u * e.value for e, _, u in moves)
            merged.append((slot, key / (1 + len(moves)), value / (1 + len(moves))))
        for slot, key, value in merged:
            back = -slot.place if not self.contiguous else 0
            slot.key, slot.value = rotate(key[None], [back], layer.theta)[0], value
        return kept


def stored(cache: Any, row: int, layer: int, head: int) -> dict[int, tuple[Tensor, Tensor]]:
    """position -> key and value that a dense cache holds."""
    (lease,) = cache.leases
    k, v, pos = (
        torch.ops.kvrewrite.read_pages(getattr(lease.store, name), lease.table[layer])[row, head]
        for name in ("k_pages", "v_pages", "pos_pages")
    )
    return {int(pos[s, 0]): (k[s], v[s]) for s in range(int(lease.lens[layer, row, head]))}


MERGING: dict[str, tuple[str, dict[str, Any], Rule]] = {
    "h2o in chunks": ("h2o", {"budget": 12, "chunk": 7}, H2ORule(budget=12, chunk=7)),
    "h2o contiguous": (
        "h2o",
        {"budget": 12, "positions": "contiguous"},
        H2ORule(budget=12, contiguous=True),
    ),
    "keydiff, which looks at merged keys": ("keydiff", {"budget": 11, "chunk": 9}, KeyDiffRule(budget=11, chunk=9)),
    "snapkv, once": (
        "snapkv",
        {"budget": 14, "window": 4},
        SnapKVRule(budget=14, recent=4, first_prompt_only=True),
    ),
    "scissorhands, many at once": (
        "scissorhands",
        {"budget": 14, "recent_tokens": 3},
        ScissorhandsRule(budget=14, recent=3),
    ),
    "ada-kv, heads that drop unequal numbers": (
        "h2o",
        {"budget": 12, "recent_tokens": 2, "head_budgets": "adakv"},
        H2ORule(budget=12, recent=2, head_budgets="adakv"),
    ),
}


@pytest.mark.parametrize("name", few(MERGING, rest=("snapkv, once", "scissorhands, many at once")))
def test_merging_against_oracle(name: str) -> None:
    """Prompt, answer, prompt, answer, of two rows: what is kept, keys and values as they are stored, and logits."""
    policy, options, rule = MERGING[name]
    model, plain = rewritten(policy, merge=True, **options), rewritten(policy, **options)
    ids = tokens(2, 48, 3)
    rows = [Oracle(llama(), Merging(rule)) for _ in ids]
    cache, other, at, changed = model.new_cache(2), plain.new_cache(2), 0, 0.0
    for width in (19, 1, 1, 1, 1, 1, 14, 1, 1, 1):
        call = ids[:, at : at + width]
        at += width
        got = model(call, past_key_values=cache).logits
        changed = max(changed, float((got - plain(call, past_key_values=other).logits).abs().max()))
        for b, oracle in enumerate(rows):
            row = call[b].tolist()
            expected = oracle.decode(row[0]) if width == 1 else oracle.prompt(row)
            assert {layer: heads[b] for layer, heads in cache.positions().items()} == oracle.kept()
            torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-4)
            for layer in oracle.layers:
                for h, entries in enumerate(layer.heads):
                    found = stored(cache, b, layer.index, h)
                    for e in entries:
                        key = e.key if rule.contiguous else layer.rotated(e)
                        torch.testing.assert_close(found[e.position][0].double(), key, rtol=0, atol=1e-4)
                        torch.testing.assert_close(found[e.position][1].double(), e.value, rtol=0, atol=1e-4)
    assert changed > 1e-3, "nothing was merged"


@pytest.mark.parametrize("options", [{"chunk": 7}, {"recent_tokens": 2, "head_budgets": "adakv"}], ids=str)
def test_merging_row_by_row(options: dict[str, Any]) -> None:
    """A padded row of a batch is the row alone; forks are bit for bit what they were forked from."""
    model = rewritten("h2o", merge=True, budget=12, **options)
    ids, mask = tokens(2, 30, 4), torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    prompt = ids[:, :22], mask[:, :22]
    batch, alone = model.new_cache(2), model.new_cache(1)
    model(prompt[0], attention_mask=prompt[1], past_key_values=batch)
    model(ids[1:, 9:22], past_key_values=alone)
    forks = [batch.fork() for _ in range(2)]
    outs: list[list[Tensor]] = [[], [], [], []]
    for t in range(22, 30):
        for out, cache, rows in zip(outs, (batch, alone, *forks), (slice(None), slice(1, 2), slice(None), slice(None))):
            out.append(model(ids[rows, t : t + 1], past_key_values=cache).logits)
    together, single, *twins = (torch.cat(out, dim=1) for out in outs)
    torch.testing.assert_close(together[1:], single, rtol=0, atol=1e-5)
    assert all(torch.equal(together, twin) for twin in twins)
    assert batch.positions() == forks[0].positions()


def test_threshold_starts_anew() -> None:
    """It is there from the first eviction on, row by row, and gone after a reset; reordered rows take theirs along."""
    model = rewritten("h2o", merge=True, budget=12, chunk=7)
    cache = model.new_cache(2)

    def thresholds() -> Tensor:
        return torch.stack([s.value for s in cache.states if s.input.startswith("state_merge_")])

    ids, mask = tokens(2, 20, 5), torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    model(ids, attention_mask=mask, past_key_values=cache)
    assert bool(thresholds()[:, 0].isfinite().all()) and bool(thresholds()[:, 1].isnan().all())
    first = thresholds()[:, 0].clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(thresholds()[:, 1], first) and bool(thresholds()[:, 0].isnan().all())
    cache.reset()
    model(ids[:, :4], past_key_values=cache)
    assert thresholds().shape == (LAYERS, 2) and bool(thresholds().isnan().all())


@pytest.mark.parametrize("policy", ["streaming_llm", "full", "attention_gate"])
def test_merging_is_refused_without_scores(policy: str) -> None:
    with pytest.raises(OptionError, match=f"{policy}: merge=True needs a policy that scores"):
        policies.make(policy, merge=True, **({"budget": 8} if policy == "streaming_llm" else {}))


# ------------------------------------------------------------------------------------------------ quantization
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "h2o": ("h2o", {"budget": 30, "chunk": 17}),
    "h2o contiguous": ("h2o", {"budget": 30, "positions": "contiguous"}),
    "streaming_llm": ("streaming_llm", {"budget": 30, "chunk": 9}),
    "keydiff": ("keydiff", {"budget": 30, "chunk": 16}),
    "snapkv": ("snapkv", {"budget": 30, "window": 4}),
    "scissorhands": ("scissorhands", {"budget": 30}),
    "sirllm": ("sirllm", {"budget": 30, "chunk": 16}),
    "ada-kv": ("h2o", {"budget": 30, "recent_tokens": 4, "head_budgets": "adakv"}),
    "merging": ("h2o", {"budget": 30, "chunk": 17, "merge": True}),
}


def run(model: Any, cache: Any, ids: Tensor, widths: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Logits of calls of these widths."""
    out, at = [], 0
    for width in widths:
        part = None if mask is None else mask[:, at : at + width]
        out.append(model(ids[:, at : at + width], attention_mask=part, past_key_values=cache).logits)
        at += width
    return torch.cat(out, dim=1)


WIDTHS = (41, 1, 1, 1, 1, 21, *[1] * 20)


@pytest.mark.filterwarnings("ignore:.*stay in full precision")
# test_quantization_against_oracle has the rest, too.
@pytest.mark.parametrize("name", few(FORMS, rest=("h2o contiguous", "keydiff", "scissorhands")))
def test_residual_as_long_as_the_text_is_dense(name: str) -> None:
    """Nothing is ever quantized: the same as without, bit for bit as long as decoding evicts nothing (where it does, slots
    lie in another order, and sums are rounded otherwise)."""
    policy, options = FORMS[name]
    ids = tokens(2, sum(WIDTHS), 6)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    dense, quantized = rewritten(policy, **options), rewritten(policy, quantize="int4", **options)
    caches = dense.new_cache(2), quantized.new_cache(2)
    expected, got = (run(m, c, ids, WIDTHS, mask) for m, c in zip((dense, quantized), caches))
    torch.testing.assert_close(got, expected, rtol=0, atol=0 if name in ("full", "snapkv") else 2e-5)
    assert caches[0].positions() == caches[1].positions()


class Quantizing(Rule):
    """What a rule keeps is stored in quantized caches of lists."""

    def __init__(self, rule: Any, *how: Any):
        self.rule, self.how, self.contiguous = rule, how, rule.contiguous
        for name in ("cut", "turn", "flags", "arrive", "renews"):
            setattr(self, name, getattr(rule, name))

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        kept = self.rule.keep(layer, moment)
        if not hasattr(layer, "slow"):
            layer.slow = [SlowHead(*self.how) for _ in kept]  # type: ignore[attr-defined]
        for entries, stays, slow in zip(layer.heads, kept, layer.slow):  # type: ignore[attr-defined]
            new, merged = {}, []
            for e in entries:
                now = (e.key if self.contiguous else layer.rotated(e)).tolist()
                if e.position not in slow.keys:
                    new[e.position] = now, e.value.tolist()
                elif max(abs(a - b) for a, b in zip(now, slow.keys[e.position])) > 1e-9:
                    slow.keys[e.position], slow.values[e.position] = now, e.value.tolist()
                    merged.append(e.position)
            slow.step([e.position for e in stays], new, merged)
            for e in stays:
                key = torch.tensor(slow.keys[e.position], dtype=torch.float64)
                e.key = key if self.contiguous else rotate(key[None], [-e.place], layer.theta)[0]
                e.value = torch.tensor(slow.values[e.position], dtype=torch.float64)
        return kept


# name: kind, residual, policy, its options, the oracle's rule
QUANTIZED: dict[str, tuple[str, int, str, dict[str, Any], Any]] = {
    "full": ("int8", 8, "full", {"chunk": None}, Rule()),
    "h2o in chunks": ("int8", 8, "h2o", {"budget": 22, "chunk": 9}, H2ORule(budget=22, chunk=9)),
    "h2o contiguous": (
        "int4", 4, "h2o", {"budget": 18, "positions": "contiguous"}, H2ORule(budget=18, contiguous=True),
    ),
    "keydiff, which looks at quantized keys": (
        "int8", 0, "keydiff", {"budget": 18, "chunk": 9}, KeyDiffRule(budget=18, chunk=9),
    ),
    "snapkv, once": (
        "fp8", 4, "snapkv", {"budget": 18, "window": 4}, SnapKVRule(budget=18, recent=4, first_prompt_only=True),
    ),
    "scissorhands, many at once": (
        "int8", 4, "scissorhands", {"budget": 22, "recent_tokens": 3}, ScissorhandsRule(budget=22, recent=3),
    ),
    "ada-kv, new pages": (
        "int4", 4, "h2o", {"budget": 18, "recent_tokens": 2, "head_budgets": "adakv"},
        H2ORule(budget=18, recent=2, head_budgets="adakv"),
    ),
    "merging": ("int8", 4, "h2o", {"budget": 18, "chunk": 9, "merge": True}, Merging(H2ORule(budget=18, chunk=9))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*stay in full precision")
@pytest.mark.parametrize("name", few(QUANTIZED, rest=("h2o in chunks",)))  # as "merging" without it
def test_quantization_against_oracle(name: str) -> None:
    """Prompt, answer, prompt, answer of two rows in fp64: what is kept, what keys and values became, and logits."""
    kind, residual, policy, options, rule = QUANTIZED[name]
    model = rewritten(policy, torch.float64, quantize=kind, quantize_group=4, quantize_residual=residual, **options)
    ids = tokens(2, 56, 3)
    rows, at = [Oracle(llama(torch.float64), Quantizing(rule, kind, 4, residual)) for _ in ids], 0
    cache = model.new_cache(2)
    for width in (27, 1, 1, 1, 1, 1, 1, 14, 1, 1, 1):
        call = ids[:, at : at + width]
        at += width
        got = model(call, past_key_values=cache).logits
        (lease,) = cache.leases
        states = {s.input.removeprefix("state_"): s.value for s in cache.states}
        for b, oracle in enumerate(rows):
            row = call[b].tolist()
            expected = oracle.decode(row[0]) if width == 1 else oracle.prompt(row)
            assert {layer: heads[b] for layer, heads in cache.positions().items()} == oracle.kept()
            torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-4)
            for layer in oracle.layers:
                i = layer.index
                for n, found in (("k", "keys"), ("v", "values")):
                    dense = torch.ops.kvrewrite.read_quantized(
                        getattr(lease.store, f"{n}_pages"), getattr(lease.store, f"{n}_params"), states[f"{n}_tail_{i}"],
                        lease.table[i], states[f"qlens_{i}"], kind, 4, n == "v",
                    )  # fmt: skip
                    for h, slow in enumerate(layer.slow):  # type: ignore[attr-defined]
                        assert int(states[f"qlens_{i}"][b, h]) == len(slow.slots)
                        stored = torch.tensor([getattr(slow, found)[p] for p in slow.order()])
                        torch.testing.assert_close(dense[b, h, : len(stored)], stored.double(), rtol=0, atol=1e-4)
    assert all(int(states[f"qlens_{i}"].min()) > 0 for i in range(LAYERS)), "nothing was quantized"


# ------------------------------------------------------------------------------------------------ what else there is
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "appends": ("full", {"quantize": "int8", "quantize_group": 16, "quantize_residual": 32}),
    "evicts": (
        "keydiff",
        {"budget": 90, "chunk": 50, "quantize": "int4", "quantize_group": 8, "quantize_residual": 16},
    ),
    "appends behind ragged heads": (
        "adakv",
        {"budget": 90, "window": 8, "quantize": "fp8", "quantize_group": 16, "quantize_residual": 16},
    ),
    "merges": ("h2o", {"budget": 90, "merge": True, "quantize": "int8", "quantize_residual": 32}),
}


def words(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def stored_bits(cache: Any) -> list[Tensor]:
    """Everything that a cache has of its live slots: codes and scores of every head, tails, lengths."""
    found = [s.value.clone() for s in cache.states]
    for lease in cache.leases:
        for i in range(len(lease.layers)):
            live = torch.arange(lease.table.shape[-1] * 64) < lease.lens[i][..., None]
            for name in lease.store.shapes:
                dense = torch.ops.kvrewrite.read_pages(getattr(lease.store, name), lease.table[i])
                mask = live if dense.shape[2] == live.shape[2] else live[..., :: live.shape[2] // dense.shape[2]]
                found.append(dense[mask])
    return found


@pytest.mark.parametrize("name", few(SHARED, rest=("evicts",)))
def test_forks_of_quantized_caches(name: str) -> None:
    """What one writes the others never see, through many generated tokens; each answers as if it were alone."""
    policy, options = SHARED[name]
    model = rewritten(policy, **options)
    document = words(2, 150, 1)

    def ask(cache: Any, seed: int) -> Tensor:
        out = [model(words(2, 9, seed), past_key_values=cache).logits]
        out += [model(words(2, 1, 100 * seed + t), past_key_values=cache).logits for t in range(24)]
        return torch.cat(out, dim=1)

    alone = []
    for seed in (1, 2, 3):
        cache = model.new_cache(2)
        model(document, past_key_values=cache)
        cache.end_prompt()
        alone.append(ask(cache, seed))
    parent = model.new_cache(2)
    model(document, past_key_values=parent)
    parent.end_prompt()
    bits, forks = stored_bits(parent), [parent.fork(), parent.fork()]
    tails = sum(s.value.nbytes for s in parent.states)
    assert forks[0].memory().shared == parent.memory().leased - tails
    assert torch.equal(ask(forks[0], 1), alone[0])
    for cache in (parent, forks[1]):
        assert all(torch.equal(a, b) for a, b in zip(stored_bits(cache), bits, strict=True))
    if name == "appends":  # the document's full pages still are the parent's, too
        assert forks[0].memory().shared > 0
    assert torch.equal(ask(parent, 2), alone[1]) and torch.equal(ask(forks[1], 3), alone[2])
    cache = forks[1]
    cache.reorder_cache(torch.tensor([1, 1]))
    out = model(words(1, 1, 7).expand(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", few(SHARED, rest=("evicts",)))
def test_padded_rows_are_the_rows_alone(name: str) -> None:
    """Codes must not depend on the batch; in fp32 keys differ by roundings, which may move a code by one at a tie."""
    policy, options = SHARED[name]
    model = rewritten(policy, **options)
    ids, mask = words(2, 170, 2), torch.ones(2, 170, dtype=torch.long)
    mask[1, :31] = 0
    batch, alone = model.new_cache(2), model.new_cache(1)
    together = run(model, batch, ids, (130, 1, 1, 18, *[1] * 20), mask)
    single = run(model, alone, ids[1:, 31:], (99, 1, 1, 18, *[1] * 20))
    torch.testing.assert_close(together[1:, 31:], single, rtol=0, atol=2e-3)
    assert {n: h[1:] for n, h in batch.positions().items()} == alone.positions()


@pytest.mark.parametrize("name", SHARED)
def test_memory_is_what_is_held(name: str) -> None:
    """Leased bytes are pages and tails, reserved ones are what the tensors have; live ones by hand."""
    policy, options = SHARED[name]
    model = rewritten(policy, **options)
    cache = model.new_cache(2)
    model(words(2, 150, 4), past_key_values=cache)
    report, (lease,) = cache.memory(), cache.leases
    states = sum(s.value.untyped_storage().nbytes() for s in cache.states)
    pools = [getattr(lease.store, n) for n in lease.store.shapes]
    assert report.reserved == sum(p.untyped_storage().nbytes() for p in pools) + states
    pages = sum(-(-int(n) // 64) for n in lease.lens.flatten())
    page = sum(p[0].numel() * p.element_size() for p in pools)
    assert report.leased == pages * page + states
    live, tails = 0.0, 0
    qlens = {
        int(s.input.removeprefix("state_").split("_")[-1]): s.value
        for s in cache.states
        if s.input.startswith("state_qlens")
    }
    for i, layer in enumerate(lease.layers):
        live += float(qlens[layer].sum()) * page / 64
        tails += int((lease.lens[i] - qlens[layer]).sum()) * ((16 + 16) * 4 + 12)
    small = sum(s.value.nbytes for s in cache.states if "tail" not in s.input)
    assert report.live == int(live) + tails + small
    assert report.live <= report.leased <= report.reserved


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_errors_of_logits(kind: str) -> None:
    """With all but a few slots quantized, relative to the largest logit."""
    ids = words(2, 200, 5)
    widths = (150, *[1] * 20, 30)
    expected = run(rewritten("full"), rewritten("full").new_cache(2), ids, widths)
    model = rewritten("full", quantize=kind, quantize_residual=32)
    got = run(model, model.new_cache(2), ids, widths)
    error = float((got - expected)[:, 150:].abs().max() / expected.abs().max())
    assert torch.equal(got[:, :150], expected[:, :150])
    assert 0 < error < {"int8": 0.02, "fp8": 0.1, "int4": 0.35}[kind], error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int2"}, "expected one of none, int8, int4, fp8"),
        ({"quantize": "int8", "quantize_group": 24}, "quantize_group is 24, expected a divisor of 64"),
        ({"quantize": "int8", "quantize_residual": 40}, "expected a multiple of quantize_group"),
        ({"quantize": "int8", "quantize_residual": -32}, "quantize_residual is -32"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        policies.make("h2o", budget=30, **options)


def test_small_budgets_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="of 100 slots the 128 newest stay in full precision"):
        rewrite(llama(), captured(), "h2o", None, budget=100, quantize="int8")


# ------------------------------------------------------------------------------------------------ models, files, compilers
@pytest.mark.filterwarnings("ignore:.*stay in full precision")
@pytest.mark.parametrize(
    "family",
    # Where the family's other tests are, which have its capture.
    [pytest.param(f, marks=pytest.mark.xdist_group(f)) for f in ("gemma3_text", "gemma3n_text", "deepseek_v3", "gpt2")],
)
def test_other_models(family: str) -> None:
    """Windows, layers that share their cache, values of another width than keys, learned positions."""
    options: dict[str, Any] = {"budget": 14, "chunk": 9}
    ids = tokens(2, 52, 8)
    widths = (31, 1, 1, 1, 9, *[1] * 9)
    how: dict[str, dict[str, Any]] = {
        "none": {},
        "exact": {"quantize": "int4", "quantize_residual": 64},
        "int8": {"quantize": "int8", "quantize_group": 4, "quantize_residual": 4},
    }
    if family == "gemma3_text":
        how["merged"] = {**how["int8"], "merge": True}
    models = {kind: shared_rewritten(family, "h2o", **options, **rest) for kind, rest in how.items()}
    found = {kind: run(m, m.new_cache(2), ids, widths) for kind, m in models.items()}
    torch.testing.assert_close(found["exact"], found["none"], rtol=0, atol=5e-5)
    size = float(found["none"].abs().max())
    # Another token may be evicted once keys are rounded, so the answer to the first chunks is what can be compared.
    assert 0 < float((found["int8"] - found["none"])[:, :14].abs().max()) < 0.1 * size
    assert family != "gemma3_text" or float((found["merged"] - found["int8"]).abs().max()) > 0
    assert all(bool(torch.isfinite(x).all()) for x in found.values())


def test_int4_needs_even_head_dims() -> None:
    model = make("gpt2", n_embd=60, hidden_size=60)  # 4 heads
    with pytest.raises(OptionError, match=r"h2o: quantize=int4, layer 0 \(transformer.h.0.attn\).*head dim is 15"):
        kvrewrite.transform(model, policy="h2o", budget=256, quantize="int4")
    assert kvrewrite.transform(model, policy="h2o", budget=256, quantize="int8").program.layout.quantize == (
        Quantize(kind="int8", group=32, residual=128)
    )


@pytest.mark.parametrize(
    ("family", "policy", "options"),
    [
        ("llama", "h2o", {"budget": 80, "merge": True}),
        ("llama", "full", {"chunk": 64, "quantize": "int8", "quantize_residual": 64}),
        ("gemma2", "h2o", {"budget": 80, "quantize": "int4", "quantize_group": 16, "quantize_residual": 16}),
        ("deepseek_v3", "keydiff", {"budget": 70, "quantize": "fp8", "quantize_residual": 32}),
    ],
)
@pytest.mark.parametrize("length", [20, 150])
def test_plan_is_what_is_leased(family: str, policy: str, options: dict[str, Any], length: int) -> None:
    small = shared_rewritten(family, policy, **options)
    cache = small.new_cache(2)
    small(words(2, length, 3), past_key_values=cache)
    plan = plan_memory(small.sites, small.policy, small.dtype.itemsize, length, batch=2)
    assert plan.evicted == cache.memory().leased <= plan.peak
    assert cache.memory().live <= cache.memory().leased <= cache.memory().reserved


INT8: dict[str, Any] = {"quantize": "int8", "quantize_group": 8, "quantize_residual": 16}


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Both options at once, in another process's eyes: the same bits; verify knows what a quantized cache promises."""
    options: dict[str, Any] = {"quantize": "int4", "quantize_group": 16, "quantize_residual": 16, "merge": True}
    small = kvrewrite.transform(llama(), policy="h2o", budget=60, chunk=30, **options)
    small.save_pretrained(tmp_path / "out")
    loaded = kvrewrite.load(tmp_path / "out")
    assert loaded.policy == small.policy
    ids, widths = words(2, 120, 3), (90, *[1] * 30)
    caches = [m.new_cache(2) for m in (small, loaded)]
    expected, got = (run(m, c, ids, widths) for m, c in zip((small, loaded), caches))
    assert torch.equal(got, expected) and caches[0].memory() == caches[1].memory()
    report = verify(tmp_path / "out", tokens=40)
    assert report.ok and all(check.ok for check in report.checks), report.as_dict()
    exact = shared_rewritten("llama", "h2o", budget=60, chunk=30, quantize="int4", quantize_residual=0)
    results = {check.name: check.ok for check in verify(exact, tokens=24).checks}
    assert results["chunked"] is None and results["original, full budget"] is True


@pytest.mark.parametrize(
    ("policy", "options", "batches"),
    [
        (
            "h2o",
            {"budget": 70, "recent_tokens": 8, "chunk": 40, "head_budgets": "adakv", "merge": True, **INT8},
            (2,),
        ),
        pytest.param("h2o", {"budget": 70, "chunk": 40, "merge": True, **INT8}, (2, 3), marks=pytest.mark.thorough),
        pytest.param(
            "adakv",
            {"budget": 60, "window": 8, "quantize": "int4", "quantize_group": 8, "quantize_residual": 8},
            (2,),
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["ragged merging int8", "merging int8", "ragged int4"],
)
def test_compiled_is_eager(policy: str, options: dict[str, Any], batches: tuple[int, ...]) -> None:
    """The mutations of tails, codes and thresholds survive, for several batch sizes, with padding; in one layer."""
    torch._dynamo.reset()
    eager, compiled = (rewrite(llama(layers=1), captured(layers=1), policy, None, **options) for _ in range(2))
    compiled.compile(backend="aot_eager")
    for batch in batches:
        ids, mask = words(batch, 92, batch), torch.ones(batch, 92, dtype=torch.long)
        mask[1, :5] = 0
        caches, widths = [m.new_cache(batch) for m in (eager, compiled)], (75, 1, 1, 12, 1, 1, 1)
        expected, got = (run(m, c, ids, widths, mask) for m, c in zip((eager, compiled), caches))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert caches[0].positions() == caches[1].positions() and caches[0].memory() == caches[1].memory()
        for ours, theirs in zip(*(stored_bits(c) for c in caches), strict=True):
            torch.testing.assert_close(
                ours.float(), theirs.float(), rtol=0, atol=1e-5 if ours.is_floating_point() else 1
            )
    torch._dynamo.reset()
