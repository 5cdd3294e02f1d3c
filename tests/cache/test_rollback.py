"""Tokens that are taken back: the cache is what it would be had it never seen them, or it says why it can't be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.errors import CacheError
from tests.cache.test_cache import check_pages, tokens
from tests.support.rewritten import rewritten

pytestmark = pytest.mark.xdist_group("llama")

# Policies that only add what is generated, and what each needs to evict from the prompt here.
GO_BACK: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("snapkv", {"budget": 40, "window": 8}),
    ("pyramidkv", {"budget": 40, "window": 8}),
    ("adakv", {"budget": 40, "window": 8}),
    ("expected_attention", {"budget": 40}),
]
# Why others don't. The tokens after the prompt have evicted, been summed up, or been ranked.
STAY: list[tuple[str, dict[str, Any], str]] = [
    ("h2o", {"budget": 40}, "has evicted, or summed up attention, up to column 60"),
    ("h2o", {"budget": 40, "decode_eviction": False}, "summed up attention, up to column 60"),
    ("tova", {"budget": 40}, "has evicted"),
    ("knorm", {"budget": 40}, "has evicted"),
    ("streaming_llm", {"budget": 40, "chunk": 16}, "ranks cached keys anew"),
    ("sirllm", {"budget": 40, "chunk": 16}, "ranks cached keys anew"),
    ("snapkv", {"budget": 40, "window": 8, "quantize": "int8", "quantize_residual": 32}, "quantized"),
    ("attention_gate", {"chunk": 16}, "the text decides"),
    ("kvzap", {"threshold": -0.2, "window": 9}, "the text decides"),
]


def held(cache: EvictionCache) -> list[Tensor]:
    """Everything in the live slots of a cache, and its lengths."""
    found = []
    for lease in cache.leases:
        found.append(lease.lens.clone())
        for layer in range(len(lease.layers)):
            for name in lease.store.shapes:
                slots = torch.ops.kvrewrite.read_pages(getattr(lease.store, name), lease.table[layer])
                live = torch.arange(slots.shape[2]) < lease.lens[layer][..., None]
                found.append(slots[live])
    return found


def counters(cache: EvictionCache) -> Any:
    return (
        cache.columns,
        cache.seen,
        cache.generated,
        cache.length,
        cache.next_rotary,
        cache.prompted,
        cache.first_prompt,
    )


def same(cache: EvictionCache, other: EvictionCache, *sharing: EvictionCache) -> None:
    """Both hold the same bits and count the same. sharing: what has a part of the cache's pages."""
    assert counters(cache) == counters(other) and torch.equal(cache.ids(), other.ids())
    assert all(torch.equal(a, b) for a, b in zip(held(cache), held(other), strict=True))
    assert (cache.memory().live, cache.memory().leased) == (other.memory().live, other.memory().leased)
    check_pages(cache, *sharing)


def start(model: Any, rows: int = 1) -> EvictionCache:
    cache: EvictionCache = model.new_cache(rows)
    model(tokens(rows, 55), cache=cache)
    cache.end_prompt()
    for t in range(2):
        model(tokens(rows, 1, seed=t), cache=cache)
    model(tokens(rows, 3, seed=5), cache=cache)
    return cache


@pytest.mark.parametrize(("policy", "options"), GO_BACK)
def test_as_if_it_had_never_seen_them(policy: str, options: dict[str, Any]) -> None:
    """Single tokens and several together are taken back, over the end of a page, too; then both caches go on."""
    model = rewritten("llama", policy, **options)
    cache, alone = start(model), start(model)
    assert cache.is_croppable
    for drafted in (1, 3, 30):
        model(tokens(1, drafted, seed=7), cache=cache)
        model(tokens(1, 1, seed=8), cache=cache)
        cache.crop(-drafted - 1)
        same(cache, alone)
        new = tokens(1, 2, seed=drafted)
        assert torch.equal(model(new, cache=cache).logits, model(new, cache=alone).logits)
    one = tokens(1, 1, seed=9)
    assert torch.equal(model(one, cache=cache).logits, model(one, cache=alone).logits)
    same(cache, alone)


def test_a_part_of_a_step() -> None:
    """Of five tokens that went in together, two stay."""
    model = rewritten("llama", "full")
    cache, alone = start(model), start(model)
    new = tokens(1, 5, seed=7)
    model(new, cache=cache)
    cache.crop(-3)
    model(new[:, :2], cache=alone)
    assert counters(cache) == counters(alone)
    for a, b in zip(held(cache), held(alone), strict=True):
        torch.testing.assert_close(a, b)
    more = tokens(1, 1, seed=8)
    torch.testing.assert_close(model(more, cache=cache).logits, model(more, cache=alone).logits)
    cache.crop(-1 - 2 - 3 - 1)  # the tokens before those, and one that was generated
    assert (cache.columns, cache.generated, cache.first_prompt) == (56, [1], [55])


def test_padded_rows_and_forks() -> None:
    """Rows with different numbers of tokens among the columns; a fork that shares the pages keeps what it has."""
    model = rewritten("llama", "full")
    cache, alone = start(model, 2), start(model, 2)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    fork = cache.fork()
    model(tokens(2, 4, seed=7), attention_mask=mask, cache=cache)
    assert cache.seen == [62, 64]
    whole = cache.fork()
    cache.crop(-4)
    same(cache, alone, fork, whole)
    same(fork, alone, cache, whole)
    assert whole.seen == [62, 64]
    model(tokens(2, 4, seed=7), attention_mask=mask, cache=fork)
    same(fork, whole, cache, whole)


@pytest.mark.thorough
def test_static_steps() -> None:
    """Lengths that lie in the buffers of a decode step are taken back, too."""
    fast = copy.deepcopy(rewritten("llama", "snapkv", budget=40, window=8))
    fast.compile(static_decode=True, backend="eager")
    cache, alone = start(fast), start(fast)
    for t in range(4):
        fast(tokens(1, 1, seed=t), cache=cache, generated=True)
    cache.crop(-3)
    fast(tokens(1, 1, seed=0), cache=alone)
    same(cache, alone, alone)
    one = tokens(1, 1, seed=9)
    assert torch.equal(fast(one, cache=cache).logits, fast(one, cache=alone).logits)


@pytest.mark.parametrize(("policy", "options", "reason"), STAY)
def test_exact_or_refused(policy: str, options: dict[str, Any], reason: str) -> None:
    """The error says why, nothing has changed, and a fork made before goes back."""
    model = rewritten("llama", policy, **options)
    cache = start(model)
    before, fork = counters(cache), cache.fork()
    assert not cache.is_croppable
    with pytest.raises(CacheError, match=rf"can't be cropped to 59 columns.*({reason}).*fork\(\) or a checkpoint"):
        cache.crop(-1)
    assert counters(cache) == before
    cache.checkpoint()
    model(tokens(1, 2, seed=7), cache=cache)
    cache.roll_back(60)
    same(cache, fork, fork, *cache.checkpoints)


@pytest.mark.parametrize(
    ("policy", "options"),
    [("h2o", {"budget": 40}), ("knorm", {"budget": 40}), ("keydiff", {"budget": 40, "chunk": 16})],
)
def test_append_only(policy: str, options: dict[str, Any]) -> None:
    """An evicting policy stops, and what is appended from then on goes back: the same keys, values and logits."""
    model = rewritten("llama", policy, **options)
    caches = [start(model) for _ in range(2)]
    for cache in caches:
        cache.append_only()
        assert cache.is_croppable
    cache, alone = caches
    slots = int(cache.live_slots()[0].max())
    model(tokens(1, 4, seed=7), cache=cache)
    model(tokens(1, 1, seed=8), cache=cache)
    assert int(cache.live_slots()[0].max()) == slots + 5
    cache.crop(-5)
    assert counters(cache) == counters(alone) and cache.positions() == alone.positions()
    for t in range(3):
        one = tokens(1, 1, seed=t)
        assert torch.equal(model(one, cache=cache).logits, model(one, cache=alone).logits)
    with pytest.raises(CacheError, match="up to column 60, and column 59"):
        cache.crop(-4)
    cache.reset()
    assert not cache.is_croppable


def test_a_first_prompt_that_goes_on() -> None:
    """A prompt after an answer says that the first one was complete; taken back, nothing has said it."""
    model = rewritten("llama", "snapkv", budget=24, window=8)
    first, more, prompt = tokens(1, 20), tokens(1, 5, seed=1), tokens(1, 40, seed=2)
    for gone in (5, 4):
        cache, alone = model.new_cache(1), model.new_cache(1)
        for each in (cache, alone):
            model(first, cache=each)
        model(more[:, :1], cache=cache)
        if gone == 4:
            model(more[:, :1], cache=alone)
        model(more[:, 1:], cache=cache)
        assert cache.prompted == [True]
        cache.crop(-gone)
        assert counters(cache) == counters(alone) and cache.prompted == alone.prompted == [False]
    with pytest.raises(CacheError, match="evicts once"):
        cache = model.new_cache(1)
        model(first, cache=cache)
        model(more[:, :1], cache=cache)
        model(more[:, 1:], cache=cache)
        cache.crop(-5)
        model(prompt, cache=cache)


@pytest.mark.thorough
def test_windows() -> None:
    """Within the window all goes back; beyond it the layer has lost what would come into view again."""
    model = rewritten("gemma3_text", "full")
    window = min(int(n) for lease in model.new_cache(1).leases for n in lease.windows if n)
    cache, alone = model.new_cache(1), model.new_cache(1)
    for each in (cache, alone):
        model(tokens(1, window - 4), cache=each)
    model(tokens(1, 3, seed=1), cache=cache)
    cache.crop(-3)
    same(cache, alone)
    model(tokens(1, 6, seed=1), cache=cache)
    with pytest.raises(CacheError, match=f"window of {window} have lost"):
        cache.crop(-6)


def test_bad_numbers() -> None:
    model = rewritten("llama", "full")
    cache = start(model)
    for wrong in (3, -61):
        with pytest.raises(CacheError, match=rf"got crop\({wrong}\), expected a number from -60 to 0"):
            cache.crop(wrong)
    cache.crop(0)
    cache.crop(-60)
    same(cache, model.new_cache(1))
    assert cache.memory().leased == 0
    cache = start(model)
    cache.drop(10, 20)
    with pytest.raises(CacheError, match="up to column 60"):
        cache.crop(-1)
