"""Options that every policy has: merging what is evicted, and quantized caches."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvrewrite import policies
from kvrewrite.capture import Captured, capture
from kvrewrite.errors import OptionError
from kvrewrite.passes.pipeline import canonical
from tests.oracle import Entry, Layer, Moment, Oracle, Rule, rotate
from tests.oracle_rules import H2ORule, KeyDiffRule, ScissorhandsRule, SnapKVRule
from tests.rewritten import rewrite
from tests.zoo import VOCAB, make

pytestmark = pytest.mark.xdist_group("options")
LAYERS = 2


@functools.cache
def llama() -> nn.Module:
    """Two layers, two kv heads, attention that prefers some tokens clearly."""
    model = make("llama", num_hidden_layers=LAYERS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return model


@functools.cache
def captured() -> Captured:
    found = capture(llama())
    canonical(found)
    return found


@functools.cache
def rewritten(policy: str, **options: Any) -> Any:
    return rewrite(llama(), captured(), policy, None, **options)


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


@pytest.mark.parametrize("name", MERGING)
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
        return torch.stack([s.value for s in cache.states if s.name.startswith("merge_")])

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
