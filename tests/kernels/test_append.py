"""Appending without a look at the slots: the same cache as by the general update, slot for slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvrewrite.kernels.groups import EQUAL, Cache, Eviction, NewTokens, Ragged, Rows
from kvrewrite.kernels.update import reference
from kvrewrite.kernels.update.append import append
from tests.kernels.test_select import POOLS, setting

UNLIMITED = 2**31 - 1
SHAPES: list[dict[str, Any]] = [
    {"lens": [[70, 5], [0, 129]], "valid": [3, 1], "tokens": 3},
    {"lens": [[64, 0]], "valid": [8], "tokens": 8, "dims": (24, 40)},
    {"lens": [[63, 60], [1, 2]], "valid": [0, 5], "tokens": 5},
    {"lens": [[100, 100]], "valid": [70], "tokens": 70},
]


def groups(args: dict[str, Any]) -> tuple[NewTokens, Rows, Cache, Eviction]:
    """Copies of the arguments of an update, in groups."""
    own = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    cache = Cache(*(own[n] for n in (*POOLS, "table", "lens")))
    rows = Rows(*(own[n] for n in ("positions", "rotary", "valid", "keep", "recent")))
    new = NewTokens(own["k"], own["v"], own["new_scores"], own["slot_scores"])
    return new, rows, cache, Eviction(own["sinks"], own["window"], own["chunk"], own["select"], own["drop"])


def made(shape: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A setting whose cached slots lie in the order of their positions, as appending leaves them."""
    heads = [[options.pop("keep", UNLIMITED)] * len(shape["lens"][0])] * len(shape["lens"])
    return setting(0, pages=4, keep=heads, shuffle=False, **shape, **options)


def live(cache: Cache) -> list[torch.Tensor]:
    """What the heads hold, slot by slot, one after the other; and how many slots that are."""
    held = torch.arange(cache.table.shape[2] * 64, device=cache.lens.device) < cache.lens[..., None]
    pools = [reference.pages.read(pool, cache.table)[held].cpu() for pool in cache[:4]]
    return [*pools, cache.lens.cpu()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rescore", [False, True])
def test_as_the_general_update(shape: dict[str, Any], rescore: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference; also where the device was offered no pages, and where slots' scores are replaced."""
    args, found = made(shape, rescore=rescore), []
    args = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    for short in (True, False):
        new, rows, cache, eviction = groups(args)
        with monkeypatch.context() as patch:
            if not short:
                patch.setattr(reference, "only_appends", lambda *_: False)
            spare = torch.full((len(cache.table), 2), -1, dtype=torch.int32)
            wider = torch.nn.functional.pad(torch.zeros_like(cache.table), (0, 1))
            assert reference.only_appends(rows, cache, eviction, Ragged(None, spare, wider)) is short
            reference.cache_update(new, rows, cache, eviction, Ragged(None, spare, wider))
        found.append([*live(cache), wider])
    assert found[0][-2].tolist() == [[n + v for n in row] for row, v in zip(shape["lens"], shape["valid"], strict=True)]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_kernel(shape: dict[str, Any]) -> None:
    """Bit for bit as the reference with scores of 0; nothing that is live changes."""
    new, rows, cache, _ = groups(made(shape))
    expected = [x.cpu() for x in cache]
    host = [type(x)(*(None if y is None else y.cpu() for y in x)) for x in (new, rows)]
    zeros = torch.zeros(new.new_scores.shape)
    reference.append(host[0]._replace(new_scores=zeros), host[1], Cache(*expected))
    append(new, rows, cache)
    for got, wanted in zip(live(cache), live(Cache(*expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 70},
        {"window": 20},
        {"chunk": 64},
        {"drop": True},
        {"spare": True},
    ],
    ids=str,
)
def test_where_something_may_go(options: dict[str, Any]) -> None:
    """Budgets, windows, chunks, dropped tokens and dealt pages are the general update's."""
    spare = options.pop("spare", False)
    _, rows, cache, eviction = groups(made(SHAPES[0], **options))
    ragged = Ragged(None, torch.ones(2, 4, dtype=torch.int32), torch.zeros_like(cache.table)) if spare else EQUAL
    cache, rows = Cache(*(x.cpu() for x in cache)), Rows(*(x.cpu() for x in rows))
    assert not reference.only_appends(rows, cache, eviction, ragged)


def test_wide_windows_and_no_room() -> None:
    """A window that the text has not filled takes nothing; slots that the table has no room for are not written."""
    _, rows, cache, eviction = groups(made(SHAPES[0], window=1000, chunk=1000))
    cache, rows = Cache(*(x.cpu() for x in cache)), Rows(*(x.cpu() for x in rows))
    assert reference.only_appends(rows, cache, eviction, EQUAL)
    assert not reference.only_appends(rows, cache._replace(table=cache.table[..., :2]), eviction, EQUAL)
