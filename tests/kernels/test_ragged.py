"""Heads that keep different numbers of slots: the pages that they lease are the memory that they take."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.cache.pages import PAGE
from kvrewrite.errors import OptionError, PolicyWeightsError
from tests.cache.test_cache import check_pages, storage, tokens
from tests.support.rewritten import captured, logits, original, rewrite, rewritten

pytestmark = pytest.mark.xdist_group("llama")
HEADS, DIM = 2, 8


def gates(bias: float, hidden: int = 64, layers: int = 2, kv_heads: int = 2, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for i in range(layers):
        for part in ("q_proj", "k_proj", "v_proj"):
            weights[f"model.layers.{i}.gate.{part}.weight"] = (
                torch.randn(HEADS * DIM, hidden, generator=generator) * scale
            )
        weights[f"model.layers.{i}.gate.o_proj.weight"] = torch.randn(kv_heads, HEADS * DIM, generator=generator)
        weights[f"model.layers.{i}.gate.o_proj.bias"] = torch.full((kv_heads,), bias)
    return weights


def gated(bias: float, **options: Any) -> Any:
    return rewrite(
        original("llama"), captured("llama"), "attention_gate", gates(bias), gate_heads=HEADS, gate_dim=DIM, **options
    )


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("adakv", {"budget": 300, "window": 8, "head_floor": 0.1}),
        ("knorm", {"budget": 300, "head_budgets": "adakv", "head_floor": 0.0}),
        ("h2o", {"budget": 0.4, "head_budgets": "adakv", "recent_tokens": 5, "layer_budgets": "pyramid"}),
        ("attention_gate", {"chunk": 200}),
    ],
)
def test_heads_pay_for_what_they_keep(policy: str, options: dict[str, Any]) -> None:
    """Pages leased by a head are those that its slots fill; what is reserved is what the tensors hold; nothing hides behind
    a mask."""
    model = gated(0.0, **options) if policy == "attention_gate" else rewritten("llama", policy, **options)
    cache = model.new_cache(2)
    model(tokens(2, 700), past_key_values=cache, logits_to_keep=1)
    check_pages(cache)
    lens = torch.stack(list(cache.live_slots().values()))
    assert len(set(lens.flatten().tolist())) > 2, "heads differ"
    memory = cache.memory()
    state = sum(s.value.untyped_storage().nbytes() for s in cache.states)
    page = cache.leases[0].store.page_bytes
    assert memory.leased == int((-(-lens // PAGE)).sum()) * page + state
    assert memory.live == int(lens.sum()) * page // PAGE + sum(s.live(cache.seen) for s in cache.states)
    assert memory.reserved == storage(cache) + state
    # What the eviction needed while it ran went back: at most as much again as is leased stays for decoding.
    assert memory.reserved - state <= 2 * (memory.leased - state) * 1.35 + page
    for t in range(5):
        model(tokens(2, 1, seed=t), past_key_values=cache)
        check_pages(cache)


def test_heads_share_one_budget() -> None:
    """Ada-KV moves slots between the heads of a layer; their sum stays, up to rounding, and decoding adds to each."""
    model = rewritten("llama", "adakv", budget=40, window=4)
    cache = model.new_cache(1)
    model(tokens(1, 90), past_key_values=cache)
    before = {layer: lens.clone() for layer, lens in cache.live_slots().items()}
    for lens in before.values():
        assert abs(int(lens.sum()) - 80) <= 2 and int(lens.min()) >= 4 + int(0.2 * 36)
    model(tokens(1, 1, seed=1), past_key_values=cache)
    assert all(torch.equal(lens, before[layer] + 1) for layer, lens in cache.live_slots().items())


def test_open_gates_change_nothing() -> None:
    """Gates that keep everything: the original's logits, whole, in chunks and token by token."""
    ids = tokens(2, 40)
    expected = logits(original("llama"), ids)
    for chunk in (64, 7):
        model = gated(1000.0, chunk=chunk)
        cache = model.new_cache(2)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, rtol=0, atol=1e-4)
        assert all(int(n) == 40 for lens in cache.live_slots().values() for n in lens.flatten())


def test_closed_gates_keep_the_first_and_the_generated() -> None:
    """Gates that drop everything: what is forced to stay stays, each token sees itself, logits are numbers."""
    model = gated(-1000.0, start=3)
    cache = model.new_cache(2)
    out = model(tokens(2, 30), past_key_values=cache).logits
    assert bool(torch.isfinite(out).all())
    assert all(heads == [[0, 1, 2]] * 2 for rows in cache.positions().values() for heads in rows)
    model(tokens(2, 1, seed=1), past_key_values=cache)
    assert all(heads == [[0, 1, 2, 30]] * 2 for rows in cache.positions().values() for heads in rows)
    model = gated(-1000.0, start=0)
    cache = model.new_cache(1)
    model(tokens(1, 30), past_key_values=cache)
    assert cache.leases[0].leased == 0  # no token, no page


def test_flags_are_causal() -> None:
    """Whole, in chunks and over turns: the same flags and the same logits."""
    ids = tokens(2, 60)
    results = []
    for chunk, widths in ((64, (60,)), (7, (60,)), (64, (20, 40)), (16, (33, 27))):
        model = gated(0.0, chunk=chunk)
        cache, at, out = model.new_cache(2), 0, []
        for width in widths:
            out.append(model(ids[:, at : at + width], past_key_values=cache).logits)
            at += width
        results.append((torch.cat(out, dim=1), cache.positions()))
    assert 0.2 < results[0][1][0][0][0].__len__() / 60 < 0.95
    for got, kept in results[1:]:
        assert kept == results[0][1]
        torch.testing.assert_close(got, results[0][0], rtol=0, atol=1e-5)


def test_a_budget_on_top_of_gates() -> None:
    model = gated(0.0, budget=12, chunk=20)
    cache = model.new_cache(1)
    model(tokens(1, 60), past_key_values=cache)
    assert all(int(lens.max()) <= 12 for lens in cache.live_slots().values())


def test_gates_that_do_not_fit() -> None:
    with pytest.raises(PolicyWeightsError, match=r"missing.*gate"):
        rewrite(original("llama"), captured("llama"), "attention_gate", {"x": torch.zeros(1)}, gate_heads=2, gate_dim=8)
    with pytest.raises(OptionError, match="gate_heads is 3 and gate_dim 8, but the weights are 16 channels wide"):
        rewrite(original("llama"), captured("llama"), "attention_gate", gates(0.0), gate_heads=3, gate_dim=8)
    with pytest.raises(OptionError, match="gates' heads and their size are not known"):
        rewrite(original("llama"), captured("llama"), "attention_gate", gates(0.0))
    found = rewrite(original("llama"), captured("llama"), "attention_gate", gates(0.0), gate_heads=4)
    assert (found.policy.gate_heads, found.policy.gate_dim) == (4, 4)


POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("streaming_llm", {}),
    ("h2o", {}),
    ("scissorhands", {}),
    ("tova", {}),
    ("sirllm", {}),
    ("snapkv", {}),
    ("pyramidkv", {}),
    ("adakv", {}),
    ("nacl", {}),
    ("expected_attention", {}),
    ("keydiff", {}),
    ("knorm", {}),
    ("random", {}),
    ("locret", {"chunk": 128, "stabilizers": 40, "local_tail": 20}),
]


@functools.cache
def reserved_without_eviction() -> int:
    model = rewritten("llama", "full")
    cache = model.new_cache(1)
    model(tokens(1, 1500), past_key_values=cache, logits_to_keep=1)
    cache.end_prompt()
    return int(cache.memory().reserved)


# These evict when others of the list do; how they score is no matter here.
ALIKE = {"scissorhands", "tova", "pyramidkv", "expected_attention", "knorm", "random"}


@pytest.mark.parametrize(
    ("policy", "options"),
    [pytest.param(*case, marks=pytest.mark.thorough) if case[0] in ALIKE else case for case in POLICIES],
)
def test_what_is_evicted_is_not_reserved(policy: str, options: dict[str, Any]) -> None:
    """After a prompt the pools hold little more than what its eviction left, whatever decoding may add later."""
    model = rewritten("llama", policy, budget=128, **options)
    cache = model.new_cache(1)
    model(tokens(1, 1500), past_key_values=cache, logits_to_keep=1)
    cache.end_prompt()
    memory, page = cache.memory(), cache.leases[0].store.page_bytes
    assert memory.reserved <= 2 * memory.leased + 2 * 4 * page
    assert memory.reserved < reserved_without_eviction() / 3
    child = cache.fork()
    model(tokens(1, 9, seed=1), past_key_values=child)
    assert child.memory().reserved <= 4 * memory.leased + 4 * 4 * page


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("h2o", {"budget": 0.5, "layer_budgets": "96,48"}),
        ("h2o", {"budget": 0.5, "layer_budgets": "160,40", "head_budgets": "adakv"}),
        ("locret", {"budget": 0.25, "chunk": 64, "local_tail": 0}),
        ("locret_q", {"budget": 0.3, "chunk": 64, "local_tail": 0, "start": 16}),
    ],
)
def test_the_newest_stay(policy: str, options: dict[str, Any]) -> None:
    """Where a layer has less room than the protected window, the window shrinks; it does not lose its newest end."""
    model = rewritten("llama", policy, **options)
    cache = model.new_cache(1)
    model(tokens(1, 300), past_key_values=cache)
    if policy == "h2o":
        assert all(299 in head for heads in cache.positions().values() for head in heads[0])
    else:
        assert all(len(set(range(200)) & set(head)) > 10 for heads in cache.positions().values() for head in heads[0])
