"""The cache as an object: pages leased and returned, honest reports, reset, beams, and clear refusals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.pages import PAGE
from kvrewrite.errors import CacheError
from tests.support.rewritten import original, rewritten

pytestmark = pytest.mark.xdist_group("llama")
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def streaming(budget: int = 70, chunk: int = 64) -> Any:
    return rewritten("llama", "streaming_llm", budget=budget, chunk=chunk)


def pages_of(cache: EvictionCache) -> list[int]:
    """Every page that a head has, over all stores (numbered apart)."""
    return [1000 * i + int(page) for i, lease in enumerate(cache.leases) for page in lease.pages.flatten() if page]


def check_pages(*caches: EvictionCache) -> None:
    """Nobody has page 0, none is lost, tables say who has what, and as many references are counted as there are.

    caches: all that share their stores."""
    caches[0].memory()  # pages of caches that are gone are returned by whoever comes next
    for i, lease in enumerate(caches[0].leases):
        store = lease.store
        counted = Counter(p - 1000 * i for cache in caches for p in pages_of(cache) if p // 1000 == i)
        assert store.references.tolist() == [counted[p] for p in range(store.total)]
        assert sorted([*counted, *store.free]) == list(range(1, store.total))
        assert store.several == sum(n > 1 for n in counted.values())
    for cache in caches:
        for lease in cache.leases:
            lens = lease.lens.numpy()
            assert np.array_equal(lease.table.numpy(), lease.pages)
            assert np.array_equal(-(-lens // PAGE), lease.counts)
            assert np.array_equal((lease.pages > 0).sum(-1), lease.counts)


def storage(cache: EvictionCache) -> int:
    return sum(getattr(lease.store, n).untyped_storage().nbytes() for lease in cache.leases for n in lease.store.shapes)


def test_pages_come_and_go() -> None:
    """As many pages as live slots need, after every call; those that eviction empties are returned."""
    model = streaming()
    cache = model.new_cache(2)
    assert pages_of(cache) == [] and cache.memory().live == cache.memory().leased == 0
    for length, slots in ((10, 10), (50, 60), (4, 64), (1, 65), (30, 70), (150, 70), (1, 70)):
        model(tokens(2, length), past_key_values=cache)
        check_pages(cache)
        live = cache.live_slots()
        assert set(live) == {0, 1} and all(bool((n == slots).all()) for n in live.values())
        heads = 2 * 2 * 2  # layers, rows, kv heads
        slot = (16 + 16) * 4 + 4 + 8
        memory = cache.memory()
        assert memory.live == heads * slots * slot
        assert memory.leased == heads * -(-slots // PAGE) * PAGE * slot
        assert memory.reserved == storage(cache) >= memory.leased


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
def test_reserved_bytes_are_storage(name: str) -> None:
    """What is reported is what the pools' tensors hold, also with windows and unequal key and value widths."""
    model = rewritten(name, "full")
    cache = model.new_cache(3)
    assert cache.memory().reserved == storage(cache)
    model(tokens(3, 90), past_key_values=cache)
    check_pages(cache)
    memory = cache.memory()
    assert memory.reserved == storage(cache) and memory.live <= memory.leased < memory.reserved
    windows = {s.layer: s.window for s in model.sites}
    for layer, slots in cache.live_slots().items():
        assert bool((slots == (windows[layer] - 1 if windows[layer] else 90)).all())


def test_rows_lease_for_themselves() -> None:
    """A short row does not pay for a long one."""
    model = rewritten("llama", "full")
    cache, mask = model.new_cache(2), torch.ones(2, 200, dtype=torch.long)
    mask[1, :190] = 0
    model(tokens(2, 200), attention_mask=mask, past_key_values=cache)
    check_pages(cache)
    assert cache.leases[0].counts[0].tolist() == [[4, 4], [1, 1]]


def test_reset_returns_the_memory() -> None:
    model = streaming()
    cache = model.new_cache(1)
    first = model(tokens(1, 100), past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.seen == [0] and not cache.is_initialized
    assert cache.memory().leased == 0 and cache.memory().reserved == storage(cache)
    assert torch.equal(model(tokens(1, 100), past_key_values=cache).logits, first)


def test_report_for_people() -> None:
    cache = streaming().new_cache(2)
    assert "batch_size=2" in repr(cache) and "leased=0 B" in repr(cache)


# ------------------------------------------------------------------------------------------------ beams
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_beam_search_is_the_originals(name: str) -> None:
    model, ids = rewritten(name, "full"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {**GREEDY, "max_new_tokens": 70, "num_beams": 3}  # beyond a page
    got = model.generate(ids, attention_mask=mask, **settings)
    expected = original(name).generate(ids, attention_mask=mask, **settings)  # type: ignore[operator]
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("streaming_llm", {"budget": 12, "chunk": 8}),
        ("h2o", {"budget": 12, "chunk": 8}),
        (
            "locret",
            {"budget": 70, "chunk": 20, "stabilizers": 3, "local_tail": 4, "decode_eviction": True},
        ),
    ],
)
def test_reordered_rows_continue_as_their_source(policy: str, options: dict[str, Any]) -> None:
    """Rows of unequal length and with evicted slots; row i goes on as row beam_idx[i] would have."""
    model = rewritten("llama", policy, **options)
    ids, mask = tokens(3, 100), torch.ones(3, 100, dtype=torch.long)
    mask[1, :70], mask[2, :40] = 0, 0
    source, following = [2, 0, 2], tokens(3, 6, seed=1)
    caches = [model.new_cache(3), model.new_cache(3)]
    for cache in caches:
        model(ids, attention_mask=mask, past_key_values=cache)
        model(tokens(3, 1, seed=2), past_key_values=cache)
    caches[0].reorder_cache(torch.tensor(source))
    check_pages(caches[0])
    assert caches[0].seen == [61, 101, 61]
    straight = torch.stack([following[source.index(s)] if s in source else following[0] for s in range(3)])
    for t in range(6):
        step = straight[source, t : t + 1]  # both rows that come from row 2 are given the same token
        moved = model(step, past_key_values=caches[0]).logits
        kept = model(straight[:, t : t + 1], past_key_values=caches[1]).logits
        torch.testing.assert_close(moved, kept[source], rtol=0, atol=1e-5)
        for moved_heads, kept_heads in zip(caches[0].positions().values(), caches[1].positions().values()):
            assert moved_heads == [kept_heads[s] for s in source]


def test_copies_of_a_row_part_ways() -> None:
    """Rows that were copied from one row own their pages: what one adds the other does not see."""
    model = rewritten("llama", "h2o", budget=12, chunk=8)
    ids = tokens(2, 30)
    cache, alone = model.new_cache(2), model.new_cache(2)
    model(ids, past_key_values=cache)
    model(ids[[1, 1]], past_key_values=alone)
    cache.reorder_cache(torch.tensor([1, 1]))
    for t in range(8):
        step = tokens(2, 1, seed=10 + t) if t < 7 else tokens(1, 1).expand(2, 1)
        got, expected = (model(step, past_key_values=c).logits for c in (cache, alone))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert cache.positions() == alone.positions()
    assert (got[0] - got[1]).abs().max() > 1e-3  # the last token was the same, the ones before were not


# ------------------------------------------------------------------------------------------------ refusals
def test_what_a_cache_refuses() -> None:
    model, ids = streaming(), tokens(2, 5)
    cache = model.new_cache(2)
    with pytest.raises(CacheError, match="batch_size is 0"):
        model.new_cache(0)
    with pytest.raises(CacheError, match="batch size 2, but the input has 3 rows"):
        model(tokens(3, 5), past_key_values=cache)
    with pytest.raises(CacheError, match="belongs to another model"):
        rewritten("llama", "full")(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="DynamicCache, expected an EvictionCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(CacheError, match="DynamicCache, expected an EvictionCache"):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2, **GREEDY)
    with pytest.raises(CacheError, match="ordinary model"):
        original("llama")(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="can't be cropped"):
        cache.crop(3)
    with pytest.raises(CacheError, match="repeats is 0"):
        cache.batch_repeat_interleave(0)
    with pytest.raises(CacheError, match=r"got rows \[2\]"):
        cache.batch_select_indices(torch.tensor([2]))
    with pytest.raises(CacheError, match=r"expected 2 numbers"):
        cache.reorder_cache(torch.tensor([0]))
    assert cache.seen == [0, 0] and cache.memory().live == 0  # none of it left a trace


def test_a_full_cache_with_a_capacity() -> None:
    """`full` with a budget refuses what does not fit, before it touches the cache."""
    model = rewritten("llama", "full", budget=20)
    cache = model.new_cache(1)
    model(tokens(1, 15), past_key_values=cache)
    with pytest.raises(CacheError, match="would hold 21 tokens"):
        model(tokens(1, 6), past_key_values=cache)
    assert cache.seen == [15] and cache.get_seq_length() == 15
    model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(CacheError, match="capacity"):
        model(tokens(1, 1), past_key_values=cache)
