"""Budgets that the text decides: pages that are dropped while decoding go back, and quantized and merged caches evict alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvrewrite.cache.pages import PAGE
from tests.cache.test_cache import check_pages
from tests.runtime.test_decoding import static
from tests.support.rewritten import rewritten

pytestmark = pytest.mark.xdist_group("llama")


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


DECODING: list[tuple[str, dict[str, Any]]] = [
    ("kvzap", {"threshold": 0.2, "window": 9}),
    ("kvzap", {"threshold": -0.3, "window": 20, "budget": 90, "positions": "contiguous"}),
    ("fast_kvzip", {"budget": 30, "n_sink": 2, "interval": 16}),
]


@pytest.mark.parametrize(("policy", "options"), DECODING)
def test_pages_go_back_while_decoding(policy: str, options: dict[str, Any]) -> None:
    """Heads have pages for at most PAGE slots more than they hold, and exactly theirs at some steps; a fork is none of it."""
    model = rewritten("llama", policy, **options)
    cache = model.new_cache(2)
    ids = tokens(2, 120)
    model(ids, past_key_values=cache, logits_to_keep=1)
    check_pages(cache)
    twin = cache.fork()
    kept, exact = twin.positions(), 0
    for t in range(2 * PAGE + 5):
        model(tokens(2, 1, seed=t), past_key_values=cache)
        for lease in cache.leases:
            lens = lease.lens.numpy()
            assert (lens <= lease.bound).all() and (lease.bound <= lens + PAGE).all()
            assert np.array_equal(-(-lease.bound // PAGE), lease.counts)
            exact += np.array_equal(lens, lease.bound)
    assert exact >= 2 and twin.positions() == kept
    live = torch.stack(list(cache.live_slots().values()))
    assert len(set(live.flatten().tolist())) > 2, "heads differ"
    assert cache.memory().leased < 2 * 2 * 2 * (-(-max(cache.seen) // PAGE)) * cache.leases[0].store.page_bytes


def test_static_decoding_returns_pages() -> None:
    """The same from static buffers, whose lengths lie elsewhere."""
    options = {"threshold": 0.2, "window": 9}
    plain, ours = rewritten("llama", "kvzap", **options), static("llama", "kvzap", **options)
    caches = [plain.new_cache(2), ours.new_cache(2)]
    for t in range(PAGE + 20):
        ids = tokens(2, 100 if t == 0 else 1, seed=t)
        got = [m(ids, past_key_values=c, logits_to_keep=1).logits for m, c in zip((plain, ours), caches)]
        torch.testing.assert_close(*got, rtol=0, atol=1e-5)
    assert caches[0].positions() == caches[1].positions()
    expected, memory = [c.memory() for c in caches]
    assert (memory.live, memory.leased) == (expected.live, expected.leased)
    # Pages that were returned stay in a pool of the model's: its place is captured.
    assert memory.reserved >= expected.reserved > expected.leased


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("kvzap", {"threshold": 0.0, "window": 4, "chunk": 17}),
        ("fast_kvzip", {"budget": 16, "n_sink": 1, "interval": 3, "decode_window": 2, "chunk": 17}),
        ("duo_attention", {"budget": 16, "start": 4, "heads": "10,01"}),
        ("trim_kv", {"budget": 24, "buffer_size": 4, "retention_gate": "rg"}),
    ],
)
def test_quantized(policy: str, options: dict[str, Any]) -> None:
    """Where the newest slots that stay as they are are all, a quantized cache is the plain one; else it drops as much."""
    models = [rewritten("llama", policy, **options)]
    for residual in (64, 8):
        quantize = {"quantize": "int8", "quantize_group": 8, "quantize_residual": residual}
        models.append(rewritten("llama", policy, **options, **quantize))
    caches, outs = [m.new_cache(2) for m in models], [[], [], []]  # type: ignore[var-annotated]
    for t, width in enumerate((40, *[1] * 12)):
        for model, cache, out in zip(models, caches, outs):
            out.append(model(tokens(2, width, seed=t), past_key_values=cache).logits)
    plain, whole, coded = (torch.cat(out, dim=1) for out in outs)
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-5)
    assert caches[0].positions() == caches[1].positions()
    assert 0 < (coded - plain).abs().max() < 0.1 * plain.abs().max()


def test_merging_behind_a_threshold() -> None:
    """What falls below the threshold is merged into what stays: the same slots in layer 0, other values."""
    options = {"threshold": 0.0, "window": 4}
    plain, merged = rewritten("llama", "kvzap", **options), rewritten("llama", "kvzap", merge=True, **options)
    caches = [m.new_cache(1) for m in (plain, merged)]
    ids = tokens(1, 40)
    outs = [m(torch.cat([ids, ids[:, :2]], dim=1)[:, :40], past_key_values=c) for m, c in zip((plain, merged), caches)]
    assert torch.equal(outs[0].logits, outs[1].logits)  # one eviction, behind the prompt
    assert caches[0].positions() == caches[1].positions()
    after = [m(ids[:, :1], past_key_values=c).logits for m, c in zip((plain, merged), caches)]
    assert not torch.equal(*after) and bool(torch.isfinite(after[1]).all())
