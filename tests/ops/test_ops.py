"""Every op against loops over single numbers in fp64, with ragged lengths, dead slots full of NaN and empty rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvrewrite.ops  # noqa: F401
from kvrewrite.ops import linear as linear_ops
from kvrewrite.ops.dispatch import SPARES

ops = torch.ops.kvrewrite
B, HKV, GROUP, D, DV, PAGE, P = 3, 2, 3, 8, 6, 4, 4
H = HKV * GROUP
LENS = [[5, 11], [0, 16], [3, 0]]  # the last slot, no slot, and borders of pages
SEEN = [20, 17, 9]  # tokens of each row that went before

MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 6},
    "chunk": {"chunk": 5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "everything": {"window": 9, "softcap": 2.0, "sinks": True, "alibi": True},
}


def masks() -> Any:
    return pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@dataclass
class State:
    """A paged cache of random content; what is not live is `dead`."""

    k_pages: Tensor
    v_pages: Tensor
    score_pages: Tensor
    pos_pages: Tensor
    table: Tensor
    lens: Tensor

    def pools(self) -> tuple[Tensor, ...]:
        return self.k_pages, self.v_pages, self.score_pages, self.pos_pages

    def slots(self, b: int, h: int) -> dict[int, tuple[Tensor, Tensor, float, int]]:
        """position -> key, value, score, rotary position of the live slots."""
        found = {}
        for s in range(int(self.lens[b, h])):
            page, at = int(self.table[b, h, s // PAGE]), s % PAGE
            assert page > 0, "a live slot on a page that is not leased"
            position, rotary = self.pos_pages[page, at].tolist()
            assert position not in found, "the same token twice"
            score = float(self.score_pages[page, at])
            found[position] = (self.k_pages[page, at].clone(), self.v_pages[page, at].clone(), score, rotary)
        return found


def state(seed: int = 0, dtype: torch.dtype = torch.float64, dead: float = math.nan, spare: int = 0) -> State:
    """Row by row and head by head: LENS slots in no order. spare: slots per head that are leased besides."""
    generator = torch.Generator().manual_seed(seed)
    total = 2 + B * HKV * P
    out = State(
        torch.full((total, PAGE, D), dead, dtype=dtype),
        torch.full((total, PAGE, DV), dead, dtype=dtype),
        torch.full((total, PAGE), dead),
        torch.full((total, PAGE, 2), 12345, dtype=torch.int32),
        torch.zeros(B, HKV, P, dtype=torch.int32),
        torch.tensor(LENS, dtype=torch.int32),
    )
    free = iter((torch.randperm(total - 1, generator=generator) + 1).tolist())
    for b in range(B):
        for h in range(HKV):
            places = torch.randperm(SEEN[b], generator=generator)[: LENS[b][h]].tolist()
            for page in range(min(P, -(-(LENS[b][h] + spare) // PAGE))):
                out.table[b, h, page] = next(free)
            for s, position in enumerate(places):
                page, at = int(out.table[b, h, s // PAGE]), s % PAGE
                out.k_pages[page, at] = torch.randn(D, generator=generator).to(dtype)
                out.v_pages[page, at] = torch.randn(DV, generator=generator).to(dtype)
                out.score_pages[page, at] = float(torch.randn((), generator=generator))
                out.pos_pages[page, at] = torch.tensor([position, position + 3])
    return out


@dataclass
class New:
    """T new tokens, of which valid[b] are real."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    valid: Tensor


def new(valid: list[int], width: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> New:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, dim: int) -> Tensor:
        return torch.randn(B, heads, width, dim, generator=generator).to(dtype)

    positions = torch.tensor(SEEN)[:, None] + torch.arange(width)
    return New(random(H, D), random(HKV, D), random(HKV, DV), positions, torch.tensor(valid, dtype=torch.int32))


def extras(mask: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    sinks = torch.randn(H, generator=generator).to(dtype) if mask.get("sinks") else None
    slopes = torch.rand(H, generator=generator).to(dtype) if mask.get("alibi") else None
    return sinks, slopes


def shape(mask: dict[str, Any]) -> tuple[float, float, int, int]:
    return 0.3, float(mask.get("softcap", 0.0)), mask.get("window", 0), mask.get("chunk", 0)


Key = tuple[int, Tensor, Tensor]  # position, key, value


def attend_one(
    q: Tensor, at: int, keys: list[Key], mask: dict[str, Any], sink: float | None, slope: float
) -> tuple[list[float], list[float], float]:
    """One query: its output, its weight on each key, and its log-sum-exp."""
    logits = []
    for position, key, _ in keys:
        x = 0.3 * sum(a * b for a, b in zip(q.tolist(), key.tolist()))
        if mask.get("softcap"):
            x = mask["softcap"] * math.tanh(x / mask["softcap"])
        x -= slope * (at - position)
        seen = position <= at
        if mask.get("window"):
            seen = seen and position > at - mask["window"]
        if mask.get("chunk"):
            seen = seen and position // mask["chunk"] == at // mask["chunk"]
        logits.append(x if seen else -math.inf)
    terms = [math.exp(x) for x in logits]
    total = sum(terms) + (math.exp(sink) if sink is not None else 0.0)
    if total == 0:
        return [0.0] * DV, [0.0] * len(keys), -math.inf
    weights = [t / total for t in terms]
    out = [sum(w * float(value[i]) for w, (_, _, value) in zip(weights, keys)) for i in range(DV)]
    return out, weights, math.log(total)


def keys_of(cache: State | None, fresh: New, b: int, h: int, t: int, hidden: Tensor | None = None) -> list[Key]:
    """What query t of a row sees of its cache and of the new tokens, before masks."""
    found = [(p, e[0], e[1]) for p, e in cache.slots(b, h).items()] if cache is not None else []
    for u in range(int(fresh.valid[b])):
        if u <= t and (hidden is None or not hidden[b, h, u] or u == t):
            found.append((int(fresh.positions[b, u]), fresh.k[b, h, u], fresh.v[b, h, u]))
    return found


def close(got: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------ attention
@masks()
def test_attention(mask: dict[str, Any]) -> None:
    fresh = new([7] * B, 7)
    fresh.positions = torch.arange(7).expand(B, 7)
    sinks, slopes = extras(mask)
    got = ops.attention(fresh.q, fresh.k, fresh.v, sinks, slopes, *shape(mask))
    for b in range(B):
        for g in range(H):
            for t in range(7):
                sink = float(sinks[g]) if sinks is not None else None
                slope = float(slopes[g]) if slopes is not None else 0.0
                keys = keys_of(None, fresh, b, g // GROUP, t)
                close(got[b, g, t], attend_one(fresh.q[b, g, t], t, keys, mask, sink, slope)[0])


@masks()
def test_attention_in_blocks(mask: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Query rows are processed in blocks of bounded size; where the borders are does not matter."""
    from kvrewrite.kernels.attention import reference

    fresh, (sinks, slopes) = new([7] * B, 7), extras(mask)
    whole = ops.attention(fresh.q, fresh.k, fresh.v, sinks, slopes, *shape(mask))
    monkeypatch.setattr(reference, "BLOCK_BYTES", B * H * 7 * 4 * 2)
    close(ops.attention(fresh.q, fresh.k, fresh.v, sinks, slopes, *shape(mask)), whole, 1e-12)


@masks()
def test_attention_gradients(mask: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(1, n, 4, d, generator=generator).double() for n, d in ((4, 3), (2, 3), (2, 2))]
    sinks = torch.randn(4, generator=generator).double().requires_grad_() if mask.get("sinks") else None
    slopes = torch.rand(4, generator=generator).double() if mask.get("alibi") else None
    scale, softcap, window, chunk = shape(mask)
    window, chunk = min(window, 2), min(chunk, 3)

    def f(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return ops.attention(q, k, v, rest[0] if rest else None, slopes, scale, softcap, window, chunk)

    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(f, (*inputs, sinks) if sinks is not None else tuple(inputs))


def run_cached(cache: State, fresh: New, mask: dict[str, Any], dense: bool, hidden: Tensor | None = None) -> Any:
    sinks, slopes = extras(mask, fresh.q.dtype)
    k_dense, k_pages = None, cache.k_pages
    if dense:  # the keys come rotated in another tensor; those on the pages must not be used
        k_dense, k_pages = ops.read_pages(cache.k_pages, cache.table), torch.full_like(cache.k_pages, math.nan)
    return ops.cached_attention(
        fresh.q, fresh.k, fresh.v, k_dense, k_pages, cache.v_pages, cache.pos_pages, cache.table, cache.lens,
        fresh.positions, fresh.valid, sinks, slopes, hidden, *shape(mask),
    )  # fmt: skip


@masks()
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("valid", "width"), [([4, 2, 5], 5), ([1, 1, 1], 1), ([0, 3, 1], 3)])
def test_cached_attention_and_observe(mask: dict[str, Any], dense: bool, valid: list[int], width: int) -> None:
    """Outputs and log-sum-exp of the real queries, and the attention that every key received from them."""
    cache, fresh, (sinks, slopes) = state(), new(valid, width), extras(mask)
    for b in range(B):  # padding behind a row's end may be anything
        for x in (fresh.q, fresh.k, fresh.v):
            x[b, :, valid[b] :] = math.nan
    before = [p.clone() for p in cache.pools()]
    out, lse = run_cached(cache, fresh, mask, dense)
    rows = torch.rand(B, width, generator=torch.Generator().manual_seed(4))
    k_dense = ops.read_pages(cache.k_pages, cache.table) if dense else None
    mass = ops.observe(
        fresh.q, fresh.k, lse, rows, k_dense, cache.k_pages, cache.pos_pages, cache.table, cache.lens, fresh.positions,
        fresh.valid, slopes, None, *shape(mask),
    )  # fmt: skip
    assert lse.dtype == mass.dtype == torch.float32 and mass.shape == (B, HKV, P * PAGE + width)
    expected = torch.zeros(B, HKV, P * PAGE + width, dtype=torch.float64)
    for b in range(B):
        for g in range(H):
            h = g // GROUP
            for t in range(valid[b]):
                sink = float(sinks[g]) if sinks is not None else None
                slope = float(slopes[g]) if slopes is not None else 0.0
                keys = keys_of(cache, fresh, b, h, t)
                value, weights, norm = attend_one(fresh.q[b, g, t], SEEN[b] + t, keys, mask, sink, slope)
                close(out[b, g, t], value)
                close(lse[b, g, t], norm, 1e-5)
                columns = [*range(LENS[b][h]), *range(P * PAGE, P * PAGE + t + 1)]
                for column, weight in zip(columns, weights, strict=True):
                    expected[b, h, column] += float(rows[b, t]) * weight
    close(mass, expected, 1e-5)
    assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(before, cache.pools()))


def test_tokens_that_a_gate_hides() -> None:
    """A hidden new token is seen by itself only."""
    cache, fresh = state(), new([4, 2, 5], 5)
    hidden = torch.rand(B, HKV, 5, generator=torch.Generator().manual_seed(6)) < 0.5
    out, _ = run_cached(cache, fresh, {}, False, hidden)
    for b in range(B):
        for g in range(H):
            for t in range(int(fresh.valid[b])):
                keys = keys_of(cache, fresh, b, g // GROUP, t, hidden)
                close(out[b, g, t], attend_one(fresh.q[b, g, t], SEEN[b] + t, keys, {}, None, 0.0)[0])


def test_queries_that_see_nothing() -> None:
    """Zero, not NaN: rows of padding on an empty cache."""
    cache, fresh = state(dead=0.0), new([0, 0, 0], 2)
    cache.lens.zero_()
    out, lse = run_cached(cache, fresh, {}, False)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_attention_in_lower_precision(dtype: torch.dtype) -> None:
    """Inputs are rounded, the arithmetic is not."""
    cache, fresh = state(dtype=dtype), new([4, 2, 5], 5, dtype=dtype)
    out, _ = run_cached(cache, fresh, {}, False)
    wide = State(cache.k_pages.double(), cache.v_pages.double(), *cache.pools()[2:], cache.table, cache.lens)
    exact = New(fresh.q.double(), fresh.k.double(), fresh.v.double(), fresh.positions, fresh.valid)
    assert out.dtype == dtype
    for b in range(B):
        count = int(fresh.valid[b])
        expected = run_cached(wide, exact, {}, False)[0][b, :, :count]
        torch.testing.assert_close(out[b, :, :count].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# ------------------------------------------------------------------------------------------------ positions
def test_read_pages() -> None:
    cache = state()
    for pool in cache.pools():
        dense = ops.read_pages(pool, cache.table)
        for b in range(B):
            for h in range(HKV):
                for s in range(P * PAGE):
                    expected = pool[int(cache.table[b, h, s // PAGE]), s % PAGE]
                    assert torch.equal(torch.nan_to_num(dense[b, h, s]), torch.nan_to_num(expected))


def test_slot_rotary() -> None:
    """Rows 0 and 2 are ranked anew, ending in front of `following`; row 1 keeps what it has."""
    cache = state()
    before = {(b, h): cache.slots(b, h) for b in range(B) for h in range(HKV)}
    got = ops.slot_rotary(
        cache.pos_pages,
        cache.table,
        cache.lens,
        torch.tensor([11, 16, 3]),
        torch.tensor([True, False, True]),
        torch.empty(0, 64),
    )
    assert got.dtype == torch.int64 and got.shape == (B, HKV, P * PAGE)
    for (b, h), entries in before.items():
        after = cache.slots(b, h)
        ordered = sorted(entries)
        end = [11, 16, 3][b]
        for s in range(P * PAGE):
            if s >= LENS[b][h]:
                assert got[b, h, s] == 0
                continue
            position = int(cache.pos_pages[int(cache.table[b, h, s // PAGE]), s % PAGE, 0])
            rank = end - len(ordered) + ordered.index(position)
            expected = entries[position][3] if b == 1 else rank
            assert int(got[b, h, s]) == after[position][3] == expected
    untouched = torch.ones(len(cache.pos_pages), dtype=torch.bool)
    untouched[cache.table.flatten().long()] = False
    assert bool((cache.pos_pages[untouched] == 12345).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(dtype: torch.dtype) -> None:
    """Channel by channel; channels without a partner stay."""
    generator = torch.Generator().manual_seed(0)
    partner = torch.tensor([2, 4, 0, 3, 1, 5])
    cos, sin = torch.randn(9, 6, generator=generator), torch.randn(9, 6, generator=generator)
    cos[:, [3, 5]], sin[:, [3, 5]] = 1.0, 0.0
    x = torch.randn(2, 2, 5, 6, generator=generator).to(dtype)
    positions = torch.randint(9, (2, 2, 5), generator=generator)
    got = ops.rotate(x, cos, sin, positions, partner)
    assert got.dtype == dtype
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)):
        b, h, s, i = index.tolist()
        p, j = int(positions[b, h, s]), int(partner[i])
        expected = float(cos[p, i]) * float(x[b, h, s, i]) + float(sin[p, i]) * float(x[b, h, s, j])
        assert float(got[b, h, s, i]) == pytest.approx(expected, rel=torch.finfo(dtype).eps, abs=1e-6)


NOTHING = (None,) * 6  # select, drop, floor, spare, next_table, threshold


# ------------------------------------------------------------------------------------------------ cache_update
def value_of(score: float) -> tuple[int, float]:
    """NaN below everything."""
    return (0, 0.0) if math.isnan(score) else (1, score)


def survivors(entries: dict[int, float], keep: int, recent: int, sinks: int, window: int, chunk: int) -> list[int]:
    """Which positions stay, written out: position -> score, all of them live."""
    following = max(entries) + 1
    useful = [
        p for p in entries if (not window or following - p < window) and (not chunk or p // chunk == following // chunk)
    ]
    recent = min(recent, max(0, keep - sum(p < sinks for p in useful)))  # as many as there is room for
    newest = sorted(entries)[max(0, len(entries) - recent) :]
    protected = sorted(p for p in useful if p < sinks or p in newest)
    others = sorted((p for p in useful if p not in protected), key=lambda p: (*(-x for x in value_of(entries[p])), p))
    return sorted((protected + others)[:keep])


UPDATES: dict[str, dict[str, Any]] = {
    "a budget": {},
    "a budget for each head": {"keep": [[6, 3], [9, 2], [1, 8]]},
    "room for all": {"keep": [[99, 99]] * 3},
    "sinks": {"sinks": 4},
    "recent": {"recent": [3, 2, 5]},
    "sinks and recent": {"sinks": 2, "recent": [2, 4, 1]},
    "more recent than kept": {"sinks": 2, "recent": [9, 9, 9], "keep": [[5, 4], [3, 8], [6, 1]]},
    "more protected than kept": {"sinks": 30, "keep": [[4, 4]] * 3},
    "window": {"window": 7},
    "window and sinks": {"window": 5, "sinks": 3, "recent": [4, 4, 4]},
    "chunk": {"chunk": 6},
    "ties": {"scores": "ties"},
    "not numbers": {"scores": "nan"},
    "replaced scores": {"slot_scores": True},
    "replaced scores with ties": {"slot_scores": True, "scores": "ties", "recent": [1, 1, 1]},
}


def draw(kind: str | None, size: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(0, 2, size, generator=generator).float()
    found = torch.randn(size, generator=generator)
    if kind == "nan":
        choice = torch.randint(0, 4, size, generator=generator)
        for i, special in enumerate((math.nan, math.inf, -math.inf)):
            found[choice == i] = special
    return found


@pytest.mark.parametrize("case", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize(
    ("valid", "width"),
    [([5, 3, 4], 5), ([1, 1, 1], 1), ([1, 1, 1], 3), ([0, 1, 1], 1), ([0, 6, 2], 6), ([0, 0, 0], 2)],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_cache_update(case: dict[str, Any], valid: list[int], width: int) -> None:
    """Chunks and single tokens; rows without new tokens keep what they have."""
    cache, fresh = state(spare=max(valid), dead=7.0), new(valid, width)
    kind = case.get("scores")
    if kind:
        for b in range(B):
            for h in range(HKV):
                for s in range(LENS[b][h]):
                    cache.score_pages[int(cache.table[b, h, s // PAGE]), s % PAGE] = draw(kind, (64,), 9)[s]
    keep = torch.tensor(case.get("keep", [[6, 6], [16, 10], [5, 2]]), dtype=torch.int32)
    keep = torch.minimum(keep, torch.tensor(P * PAGE, dtype=torch.int32))
    recent = torch.tensor(case.get("recent", [0, 0, 0]), dtype=torch.int32)
    scores = draw(kind, (B, HKV, width), 11)
    for b in range(B):
        scores[b, :, valid[b] :] = math.inf  # padding that would win
    replaced = draw(kind, (B, HKV, P * PAGE), 12) if case.get("slot_scores") else None
    rotary = fresh.positions + 40
    expected: dict[tuple[int, int], dict[int, Any]] = {}
    for b in range(B):
        for h in range(HKV):
            entries = cache.slots(b, h)
            if replaced is not None:
                for s, position in enumerate(entries):  # in the order of slots
                    old = entries[position]
                    entries[position] = (old[0], old[1], float(replaced[b, h, s]), old[3])
            for t in range(valid[b]):
                position = int(fresh.positions[b, t])
                score = float(scores[b, h, t])
                entries[position] = (fresh.k[b, h, t], fresh.v[b, h, t], score, int(rotary[b, t]))
            if valid[b]:
                kept = survivors(
                    {p: e[2] for p, e in entries.items()}, int(keep[b, h]), int(recent[b]), case.get("sinks", 0),
                    case.get("window", 0), case.get("chunk", 0),
                )  # fmt: skip
                entries = {p: entries[p] for p in kept}
            expected[b, h] = entries
    needed = max(len(e) for e in expected.values())
    assert needed <= P * PAGE
    foreign = torch.ones(len(cache.k_pages), dtype=torch.bool)
    foreign[cache.table.flatten().long()] = False
    ops.cache_update(
        fresh.k, fresh.v, scores, replaced, fresh.positions, rotary, fresh.valid, keep, recent, *cache.pools(), cache.table,
        cache.lens, case.get("sinks", 0), case.get("window", 0), case.get("chunk", 0), *NOTHING,
    )  # fmt: skip
    for (b, h), entries in expected.items():
        got = cache.slots(b, h)
        assert sorted(got) == sorted(entries), f"row {b}, head {h}"
        for position, (k, v, score, place) in entries.items():
            assert torch.equal(got[position][0], k) and torch.equal(got[position][1], v)
            assert got[position][2] == score or math.isnan(got[position][2]) == math.isnan(score) is True
            assert got[position][3] == place
    assert bool((cache.k_pages[foreign] == 7.0).all()), "a page of somebody else was written"


def test_cache_update_refuses_to_overflow() -> None:
    cache, fresh = state(dead=0.0), new([4, 4, 4], 4)
    keep = torch.full((B, HKV), 99, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cache overflow: 20 slots to keep, but the table holds 16"):
        ops.cache_update(
            fresh.k, fresh.v, torch.zeros(B, HKV, 4), None, fresh.positions, fresh.positions, fresh.valid, keep,
            torch.zeros(B, dtype=torch.int32), *cache.pools(), cache.table, cache.lens, 0, 0, 0, *NOTHING,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ registration
def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every op with arguments; a comma and a word tell several calls of one op apart."""
    cache, fresh = state(dead=0.0, dtype=torch.float32, spare=4), new([3, 1, 2], 3, dtype=torch.float32)
    sinks, slopes = extras({"sinks": True, "alibi": True}, torch.float32)
    where = (cache.pos_pages, cache.table, cache.lens, fresh.positions, fresh.valid)
    q, k, v = (x.clone().requires_grad_() for x in (fresh.q, fresh.k, fresh.v))
    table, partner = torch.randn(40, D), torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    rows, lse = torch.ones(B, 3), torch.zeros(B, H, 3)
    keep, recent = torch.full((B, HKV), 6, dtype=torch.int32), torch.ones(B, dtype=torch.int32)
    mass, places = torch.rand(B, HKV, 9), torch.arange(-1, 8).expand(B, HKV, 9).clone()
    scores = torch.randn(B, HKV, 3), torch.randn(B, HKV, P * PAGE)
    arrive = (fresh.positions, fresh.positions, fresh.valid, keep, recent)
    free = [p for p in range(1, len(cache.k_pages)) if p not in cache.table][:4]
    spare = torch.tensor([[*free], [-1] * 4, [-1] * 4], dtype=torch.int32)
    ragged = (
        torch.randn(B, HKV, P * PAGE + 3),
        torch.rand(B, HKV, 3) < 0.2,
        torch.tensor([0.2, -1, -1], dtype=torch.float64),
        spare,
        torch.zeros(B, HKV, 4, dtype=torch.int32),
        torch.full((B,), math.nan),
    )
    total = len(cache.k_pages)
    wide_table = torch.randn(int(cache.pos_pages[..., 1].max()) + 1, D)
    coded = {  # int8 in groups of 2, 4 slots in full precision
        "k_pages": torch.randint(256, (total, PAGE, D), dtype=torch.uint8),
        "v_pages": torch.randint(256, (total, PAGE, DV), dtype=torch.uint8),
        "k_params": torch.randn(total, PAGE // 2, D, 2),
        "v_params": torch.randn(total, PAGE, DV // 2, 2),
        "k_tail": torch.randn(B, HKV, 6, D),
        "v_tail": torch.randn(B, HKV, 6, DV),
    }
    qlens = (cache.lens - 4).clamp(min=0)
    pools = (coded["k_pages"], coded["v_pages"], coded["k_params"], coded["v_params"], *cache.pools()[2:])
    tails = (coded["k_tail"], coded["v_tail"], cache.table, cache.lens, qlens)
    k_read, v_read = (
        ops.read_quantized(
            coded[f"{x}_pages"], coded[f"{x}_params"], coded[f"{x}_tail"], cache.table, qlens, "int8", 2, x == "v"
        )
        for x in "kv"
    )
    return {
        "attention": (ops.attention, (q, k, v, sinks, slopes, 0.3, 2.0, 2, 0)),
        "read_pages": (ops.read_pages, (cache.k_pages, cache.table)),
        "slot_rotary": (
            ops.slot_rotary,
            (
                cache.pos_pages,
                cache.table,
                cache.lens,
                torch.tensor([11, 16, 3]),
                torch.tensor([True, False, True]),
                torch.empty(0, 64),
            ),
        ),
        "slot_rotary_layers": (
            ops.slot_rotary_layers,
            (
                cache.pos_pages, cache.table[None], cache.lens[None], 1, torch.tensor([11, 16, 3]),
                torch.tensor([True, False, True]), torch.empty(0, 64),
            ),
        ),
        "read_rotated": (
            ops.read_rotated,
            (cache.k_pages, cache.table, cache.lens, table, table, torch.zeros(B, HKV, P * PAGE, dtype=torch.int64), partner, 0),
        ),
        "settle_keys": (
            ops.settle_keys,
            (cache.k_pages, cache.pos_pages, cache.table, cache.lens, wide_table, wide_table, partner, False),
        ),
        "decode_attention": (
            ops.decode_attention,
            (
                fresh.q[:, :, :1], fresh.k[:, :, :1], fresh.v[:, :, :1], None, None, cache.k_pages, cache.v_pages,
                cache.pos_pages, cache.table, cache.lens, fresh.positions[:, :1], torch.ones(B, dtype=torch.int32), None, None,
                *shape({}), True,
            ),
        ),
        "turn_both": (ops.turn_both, (fresh.q, fresh.k, torch.randn(B, 3, D), torch.randn(1, 3, D))),
        "attend_and_update": (
            ops.attend_and_update,
            (
                fresh.q, fresh.k, fresh.v, None, None, sinks, slopes, None, *shape({}), fresh.k, fresh.v, *scores, *arrive,
                *cache.pools(), cache.table, cache.lens, 1, 0, 0, None, None,
            ),
        ),
        "decode_attention_quantized": (
            ops.decode_attention_quantized,
            (
                fresh.q[:, :, :1], fresh.k[:, :, :1], fresh.v[:, :, :1], *pools[:4], *tails[:2], cache.pos_pages, *tails[2:],
                fresh.positions[:, :1], torch.ones(B, dtype=torch.int32), None, None, "int8", 2, *shape({}), True,
            ),
        ),
        "linears": (ops.linears, (torch.randn(B, 1, 8), [torch.randn(4, 8), torch.randn(6, 8)], [torch.randn(4), None])),
        "gated_linear": (ops.gated_linear, (torch.randn(B, 1, 8), torch.randn(4, 8), torch.randn(4, 8), "silu")),
        "norm_linears": (
            ops.norm_linears,
            (torch.randn(B, 1, 8), torch.randn(8), 1e-5, [torch.randn(4, 8), torch.randn(6, 8)], [torch.randn(4), None]),
        ),
        "norm_gated_linear": (
            ops.norm_gated_linear,
            (torch.randn(B, 1, 8), torch.randn(8), 1e-5, torch.randn(4, 8), torch.randn(4, 8), "silu"),
        ),
        "token_update": (
            ops.token_update,
            (
                fresh.k[:, :, :1], fresh.v[:, :, :1], torch.randn(B, 1, 6), None, fresh.positions[:, :1],
                fresh.positions[:, :1], torch.ones(B, dtype=torch.int32), *arrive[3:], *cache.pools(), cache.table,
                cache.lens, 1, 0, 0, None, None, torch.randn(HKV, 6), "silu", *wide_table[:B, None].repeat(2, 1, 1, 1),
            ),
        ),
        "append_slots": (
            ops.append_slots,
            (fresh.k, fresh.v, *arrive[:3], *cache.pools(), cache.table, cache.lens),
        ),
        "linear_add": (ops.linear_add, (torch.randn(B, 1, 8), torch.randn(4, 8), None, torch.randn(B, 1, 4))),
        "rotate": (ops.rotate, (fresh.k, table, table, torch.randint(40, (B, HKV, 3)), partner)),
        "cached_attention": (
            ops.cached_attention,
            (fresh.q, fresh.k, fresh.v, None, cache.k_pages, cache.v_pages, *where, sinks, slopes, None, *shape({})),
        ),
        "observe": (ops.observe, (fresh.q, fresh.k, lse, rows, None, cache.k_pages, *where, slopes, None, *shape({}))),
        "observe, newest": (
            ops.observe,
            (fresh.q, fresh.k, lse, rows, None, cache.k_pages, *where, None, None, *shape({}), torch.rand(B, 3), 2),
        ),
        "cache_update": (
            ops.cache_update,
            (fresh.k, fresh.v, *scores, *arrive, *cache.pools(), cache.table, cache.lens, 1, 0, 0, *NOTHING),
        ),
        "cache_update, ragged": (
            ops.cache_update,
            (fresh.k, fresh.v, *scores, *arrive, *cache.pools(), cache.table, cache.lens, 1, 0, 0, *ragged),
        ),
        "cached_attention, sparse": (
            ops.cached_attention,
            (
                fresh.q, fresh.k, fresh.v, None, cache.k_pages, cache.v_pages, *where, sinks, None, None, *shape({}), None,
                ",".join(["a_shape:1:1"] * H),
            ),
        ),
        "cached_attention, quantized": (
            ops.cached_attention,
            (
                fresh.q, fresh.k, fresh.v, k_read, *pools[:2], *where, None, None, None, *shape({}), v_read,
            ),
        ),
        "read_quantized": (
            ops.read_quantized,
            (coded["v_pages"], coded["v_params"], coded["v_tail"], cache.table, qlens, "int8", 2, True),
        ),
        "cache_update_quantized": (
            ops.cache_update_quantized,
            (fresh.k, fresh.v, *scores, *arrive, None, None, *pools, *tails, "int8", 2, 1, 0, 0, *NOTHING),
        ),
        "cache_update_quantized, ragged": (
            ops.cache_update_quantized,
            (fresh.k, fresh.v, *scores, *arrive, k_read, v_read, *pools, *tails, "int8", 2, 1, 0, 0, *ragged),
        ),
        "slot_positions": (ops.slot_positions, where),
        "newest_rows": (ops.newest_rows, (fresh.positions, fresh.valid, recent)),
        "newest_ranks": (ops.newest_ranks, (places,)),
        "uniform": (ops.uniform, (places, 3, 1)),
        "ranks": (ops.ranks, (mass, mass > 0.3)),
        "pool_window": (ops.pool_window, (mass, torch.tensor([9, 7, 5], dtype=torch.int32), 2, 3, True)),
        "key_difference": (ops.key_difference, (torch.randn(B, HKV, 9, D), places)),
        "recent_queries": (ops.recent_queries, (fresh.q, torch.randn(B, HKV * GROUP, 4, D), fresh.valid)),
        "joint_scores": (
            ops.joint_scores,
            (torch.randn(B, HKV * GROUP, 2, D), torch.randn(B, HKV, 9, D), places, 0.3, 3, 0.1, recent),
        ),
        "lag_scores": (ops.lag_scores, (torch.randn(B, HKV, 9, D), torch.randn(B, HKV, 9, D), fresh.valid, 1, 3, True)),
        "leverage": (ops.leverage, (fresh.k, torch.randn(HKV, D, 2), fresh.valid, 0, 0)),
        "block_column_mass": (ops.block_column_mass, (fresh.q, fresh.k, fresh.valid, 2, 0, 1)),
        "projected_norm": (ops.projected_norm, (fresh.v, torch.randn(7, H * fresh.v.shape[3]))),
        "expected_attention": (
            ops.expected_attention,
            (fresh.q, fresh.k, fresh.v, table, table, partner, fresh.valid, 0.3, 1, 8, 0.1),
        ),
        "surprisal": (
            ops.surprisal,
            (torch.randn(B, 3, 11), torch.randint(11, (B, 3)), fresh.valid, torch.randn(B, 11), fresh.positions),
        ),
        "sink_gate": (
            ops.sink_gate,
            (
                torch.randn(B, 3, HKV * GROUP * 5), torch.randn(B, 3, HKV * 5), torch.randn(5), torch.randn(5),
                torch.randn(HKV, 1, 4, 5), torch.randn(HKV, 1, GROUP),
            ),
        ),
        "reconstruction": (
            ops.reconstruction,
            (
                fresh.q, fresh.k, torch.randn(B, HKV, P * PAGE), *repeated_slots(), None, cache.k_pages, cache.table,
                fresh.positions, fresh.valid, sinks, slopes, 0.3, 0.0, 1, 6,
            ),
        ),
        "entering": (ops.entering, (fresh.positions, fresh.valid, repeated_slots()[1], HKV)),
        "pin_scores": (ops.pin_scores, (mass, places, [recent - 1, recent + 3], [recent, recent + 5])),
        "unhide_pinned": (ops.unhide_pinned, (scores[0] > 0, fresh.positions, [recent - 1], [recent + 2])),
        "kept_above": (ops.kept_above, (mass, places, recent, keep, recent, 0.5, 7, 0)),
        "share_layers": (ops.share_layers, ([mass, mass], [places, places], [keep - 5, keep - 4], recent, 1)),
        "gate": (
            ops.gate,
            (
                torch.randn(B, 3, 8), torch.randn(B, 3, 8), torch.randn(B, 3, 8), torch.zeros(B, 32, 8),
                torch.zeros(B, 32, 8), fresh.positions, fresh.valid, 2,
            ),
        ),
    }  # fmt: skip


def repeated_slots() -> tuple[Tensor, Tensor]:
    """begins and ends of the part that each row repeats; the second row repeats nothing."""
    return torch.tensor([3, 0, 1], dtype=torch.int32), torch.tensor([9, 0, 5], dtype=torch.int32)


@pytest.mark.parametrize("dense", [False, True], ids=["pages", "dense"])
@pytest.mark.parametrize("mask", [{}, {"sinks": True, "alibi": True, "softcap": 2.0}], ids=["plain", "all"])
def test_reconstruction(mask: dict[str, Any], dense: bool) -> None:
    """One query at a time, over the first slot, the part and what was read so far; slots are in order of position, as before
    any eviction. Padding counts for nothing, whatever it holds."""
    cache, fresh, (sinks, slopes) = state(dead=0.0), new([5, 4, 3], 5), extras(mask)
    begins, ends = repeated_slots()
    cached = torch.ops.kvrewrite.read_pages(cache.k_pages, cache.table)
    fresh.q[2, :, 3:], fresh.k[2, :, 3:] = math.nan, math.nan
    stored = torch.arange(B * HKV * cached.shape[2], dtype=torch.float32).reshape(B, HKV, -1)
    given = cached if dense else None
    got = ops.reconstruction(
        fresh.q, fresh.k, stored, begins, ends, given, cache.k_pages, cache.table, fresh.positions, fresh.valid, sinks,
        slopes, 0.3, float(mask.get("softcap", 0.0)), 1, 6,
    )  # fmt: skip
    for b in range(B):
        for h in range(HKV):
            part, most = range(int(begins[b]), int(ends[b])), {}
            for g in range(h * GROUP, (h + 1) * GROUP) if part else ():
                for t in range(int(fresh.valid[b])):
                    keys = [(p, cached[b, h, p], torch.zeros(DV)) for p in [0, *part]]
                    keys += keys_of(None, fresh, b, h, t)
                    at, sink = int(fresh.positions[b, t]), None if sinks is None else float(sinks[g])
                    slope = 0.0 if slopes is None else float(slopes[g])
                    _, weights, _ = attend_one(fresh.q[b, g, t], at, keys, mask, sink, slope)
                    for p, weight in zip(part, weights[1:]):
                        most[p] = max(most.get(p, 0.0), weight)
            expected = [most.get(p, float(stored[b, h, p])) for p in range(cached.shape[2])]
            close(got[b, h], expected, 1e-6)
            assert len(most) == len(part) and bool((got[b, h, list(part)] <= 1).all())


def test_entering() -> None:
    """To an update a row that repeats has one token, the last of its text, which is dropped; others are as they are."""
    fresh, (_, ends) = new([3, 2, 0], 3), repeated_slots()
    positions, valid, drop = ops.entering(fresh.positions, fresh.valid, ends, HKV)
    assert (fresh.positions - positions).tolist() == [[1] * 3, [0] * 3, [1] * 3] and valid.tolist() == [1, 2, 0]
    assert drop.shape == (B, HKV, 3) and drop[[0, 2]].all() and not drop[1].any()


def test_kept_above() -> None:
    """Slots that pass or are new, as far as somebody can still see them; rows that do not evict; a budget; no number."""
    generator = torch.Generator().manual_seed(4)
    places = torch.stack([torch.randperm(20, generator=generator)[:9] for _ in range(B * HKV)]).reshape(B, HKV, 9)
    places[0, 1, 2:], places[2] = -1, -1
    scores = torch.randn(B, HKV, 9, generator=generator)
    scores[0, 0, 3] = math.nan
    recent, evicts = torch.tensor([2, 0, 3], dtype=torch.int32), torch.tensor([1, 1, 0], dtype=torch.int32)
    keep = torch.tensor([[7, 7], [2, 7], [7, 7]], dtype=torch.int32)
    for rows in (evicts, 1 - evicts):
        for window, chunk in ((0, 0), (7, 0), (0, 6)):
            got = ops.kept_above(scores, places, recent, keep, rows, 0.2, window, chunk)
            for b in range(B):
                following = int(places[b].max()) + 1
                for h in range(HKV):
                    count = 0
                    for p, s in zip(places[b, h].tolist(), scores[b, h].tolist()):
                        newer = sum(q > p for q in places[b, h].tolist())
                        seen = p >= 0 and not (window and following - p >= window)
                        seen = seen and not (chunk and p // chunk != following // chunk)
                        count += seen and (s >= 0.2 or newer < recent[b] or not rows[b])
                    assert got[b, h] == min(count, int(keep[b, h])), (b, h, window, chunk)


@pytest.mark.parametrize("budget", [2, 4, 40])
def test_share_layers(budget: int) -> None:
    """One sorted list a row over layers of different widths; equal scores go to the first layer and head."""
    generator = torch.Generator().manual_seed(5)
    places, scores, keep = [], [], []
    for heads, width in ((2, 9), (3, 5)):
        place = torch.stack([torch.randperm(30, generator=generator)[:width] for _ in range(B * heads)])
        places.append(place.reshape(B, heads, width))
        places[-1][1, 0, 2:], places[-1][2] = -1, -1
        scores.append(torch.randint(4, (B, heads, width), generator=generator) / 4)
        keep.append(torch.full((B, heads), budget, dtype=torch.int32))
    recent, sinks = torch.tensor([1, 0, 2], dtype=torch.int32), 3
    got = ops.share_layers(scores, places, keep, recent, sinks)
    for b in range(B):
        everything = []
        for layer, (place, score) in enumerate(zip(places, scores)):
            for h in range(place.shape[1]):
                for p, s in zip(place[b, h].tolist(), score[b, h].tolist()):
                    safe = p < sinks or sum(q > p for q in place[b, h].tolist()) < recent[b]
                    if p >= 0:
                        everything.append((-math.inf if safe else -s, layer, h))
        stays = sorted(everything)[: budget * 5]
        for layer, found in enumerate(got):
            assert found[b].tolist() == [sum(s[1:] == (layer, h) for s in stays) for h in range(found.shape[1])]


@pytest.mark.parametrize("name", calls())
def test_opcheck(name: str) -> None:
    """Schemas are honest about mutation and aliases, fakes have the right shapes, and ops trace with dynamic shapes."""
    op, arguments = calls()[name]
    torch.library.opcheck(op.default, arguments)


class Products(TorchDispatchMode):
    """Records which products of matrices are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_tokens_go_through_a_linear_together() -> None:
    """After attention, compiled code has (B, 1, K) with a stride of less than K where the size is 1: torch's B products."""
    x, weight = torch.randn(5, 8).as_strided((5, 1, 8), (8, 4, 1)), torch.randn(6, 8)
    with Products() as plain:
        expected = torch.nn.functional.linear(x, weight)
    assert plain.names == ["bmm.default"]
    with Products() as found:  # what the ops below call, which the mode does not look into
        own = linear_ops.linear(x, weight)
    assert found.names == ["mm.default"]
    outs = [own, ops.linears(x, [weight], [None])[0], ops.linear_add(x, weight, None, torch.zeros(5, 1, 6))]
    for out in outs:
        torch.testing.assert_close(out, expected)


def test_every_op_is_checked() -> None:
    defined = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("kvrewrite::")
    }
    # The backend's own op marks where a cache is, takes a handle instead of tensors and never runs (tests/dynamo).
    # Those of training are there only once something trains (test_gated_attention_backward.py). Carried states and latents
    # have their own files (tests/passes/test_carry_state.py, tests/cache/test_latent.py), and so have budgets that heads of
    # several processes share (tests/passes/test_shard.py), sums over processes (tests/runtime/test_parallel.py) and memories
    # (tests/policies/test_infllm.py).
    elsewhere = {
        "through_cache", "gated_attention", "gated_attention_backward", "linear_scan", "decayed_sum", "cached_sum", "cached_scan",
        "cached_past", "with_past", "latent_attention", "shared_budgets", "share_layers_together",
        "sum_ranks", "sum_ranks_add", "look_up", "recall",
    }  # fmt: skip
    assert defined - elsewhere == {name.split(",")[0] for name in calls()}


@pytest.mark.skipif(not SPARES, reason="torch before 2.13 counts them")
def test_no_versions_of_caches_are_counted() -> None:
    """Ops that write to caches do not look up their arguments to count versions, which nothing reads."""
    ops = [getattr(torch.ops.kvrewrite, name) for name in dir(torch.ops.kvrewrite)]
    names = [op.default.name() for op in ops if hasattr(op, "default") and op.default._schema.is_mutable]
    counts = [n for n in names if not torch._C._dispatch_kernel_for_dispatch_key_is_fallthrough(n, "ADInplaceOrView")]
    assert len(names) > 10 and not counts
