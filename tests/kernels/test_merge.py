"""D2O's merging against loops over single tokens in fp64, with dead slots full of NaN and heads that drop unequal numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kvrewrite.ops  # noqa: F401
from kvrewrite.kernels.update import merge as module
from kvrewrite.kernels.update.merge import merge

B, HKV, N, D, DV = 3, 2, 14, 6, 4
NONE = float("nan")  # the threshold before the first eviction


def cosine(a: list[float], b: list[float]) -> float | None:
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return None if length == 0 else sum(x * y for x, y in zip(a, b)) / length


def slow(
    k: Tensor, v: Tensor, kept: Tensor, victims: Tensor, pos: Tensor, threshold: float
) -> tuple[Tensor, Tensor, float]:
    """One row: k (Hkv, N, D), v, kept, victims, pos; token by token, as the method is written down."""
    keys, values = k.double().tolist(), v.double().tolist()
    found: list[list[tuple[int, int, float] | None]] = []  # head -> its victims: slot, nearest kept slot, similarity
    for h in range(k.shape[0]):
        mine: list[tuple[int, int, float] | None] = []
        for s in sorted((s for s in range(k.shape[1]) if victims[h, s]), key=lambda s: int(pos[h, s])):
            best: tuple[float, int, int] | None = None
            for c in range(k.shape[1]):
                u = cosine(keys[h][s], keys[h][c]) if kept[h, c] else None
                if u is None:
                    continue
                u = float(torch.tensor(u).float())
                if best is None or u > best[0] or (u == best[0] and pos[h, c] < best[1]):
                    best = u, int(pos[h, c]), c
            mine.append(None if best is None else (s, best[2], best[0]))
        found.append(mine)
    every = [x[2] for mine in found for x in mine if x is not None]
    if not every:
        return k, v, threshold
    mean = sum(every) / len(every)
    threshold = mean if math.isnan(threshold) else 0.5 * threshold + 0.5 * mean
    new_k, new_v = k.clone(), v.clone()
    arrivals: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for i in range(max(len(mine) for mine in found)):
        together = [(h, mine[i]) for h, mine in enumerate(found) if i < len(mine) and mine[i] is not None]
        if together and sum(x[2] for _, x in together) / len(together) >= threshold - 1e-12:  # type: ignore[index]
            for h, x in together:
                arrivals.setdefault((h, x[1]), []).append((x[0], x[2]))  # type: ignore[index]
    for (h, c), dropped in arrivals.items():
        for new, old in ((new_k, keys), (new_v, values)):
            for d in range(new.shape[-1]):
                total = old[h][c][d] + sum(u * old[h][s][d] for s, u in dropped)
                new[h, c, d] = total / (1 + len(dropped))
    return new_k, new_v, threshold


def draw(seed: int, dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, ...]:
    """Random k, v, kept, victims, pos; what is dead is NaN. Row 2 drops nothing; heads drop unequal numbers."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(B, HKV, n, D, generator=g) + 1, torch.randn(B, HKV, n, DV, generator=g)
    role = torch.randint(0, 5, (B, HKV, n), generator=g)  # 0: dead, 1 and 2: dropped, others: kept
    kept, victims = role > 2, (role == 1) | (role == 2)
    kept[2] |= victims[2]
    victims[2] = False
    pos = torch.stack([torch.randperm(n * 3, generator=g)[:n] for _ in range(B * HKV)]).reshape(B, HKV, n)
    dead = ~(kept | victims)
    k[dead], v[dead] = float("nan"), float("inf")
    return k.to(dtype), v.to(dtype), kept, victims, pos


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_against_loops(seed: int, dtype: torch.dtype) -> None:
    k, v, kept, victims, pos = draw(seed, dtype)
    threshold = torch.tensor([NONE, 0.8, NONE])
    new_k, new_v, after = merge(k, v, kept, victims, pos, threshold)
    assert new_k.dtype == new_v.dtype == dtype and after.dtype == torch.float32
    changed = 0
    for b in range(B):
        want_k, want_v, want = slow(k[b], v[b], kept[b], victims[b], pos[b], float(threshold[b]))
        assert float(after[b]) == pytest.approx(want, rel=1e-6, nan_ok=True)
        live = kept[b]
        tolerance = {"rtol": 2.0**-7, "atol": 1e-6} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(new_k[b][live], want_k[live], **tolerance)
        torch.testing.assert_close(new_v[b][live], want_v[live], **tolerance)
        # Bit for bit what it was: where nothing arrived, what was dropped, and what is dead.
        same = (want_k == k[b]).all(-1) | ~live
        assert torch.equal(new_k[b][same].nan_to_num(7), k[b][same].nan_to_num(7))
        assert torch.equal(new_v[b][same], v[b][same])
        changed += int((~same).sum())
    assert changed > 3, "nothing was merged: the test shows nothing"
    assert math.isnan(float(after[2])), "a row that drops nothing has no threshold yet"


def test_threshold_over_several_evictions() -> None:
    """The mean at first, then half old, half new, and compared after it was renewed."""
    threshold = torch.tensor([NONE, NONE, NONE])
    wanted = [NONE] * B
    for seed in range(5):
        k, v, kept, victims, pos = draw(20 + seed)
        new_k, _, threshold = merge(k, v, kept, victims, pos, threshold)
        for b in range(B):
            want_k, _, wanted[b] = slow(k[b], v[b], kept[b], victims[b], pos[b], wanted[b])
            torch.testing.assert_close(new_k[b][kept[b]], want_k[kept[b]], rtol=1e-5, atol=1e-6)
        assert threshold.tolist() == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def by_hand(u: float) -> tuple[Tensor, ...]:
    """One head: kept keys (1, 0) and (0, 1) at slots 0 and 1, one token to drop whose cosine to the first is u."""
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [u, -math.sqrt(1 - u * u)]])[None, None]
    v = torch.tensor([[2.0], [4.0], [10.0]])[None, None]
    kept = torch.tensor([[[True, True, False]]])
    return k, v, kept, ~kept, torch.tensor([[[0, 1, 2]]])


def test_by_hand() -> None:
    """(kept + u * dropped) / 2, as the authors' scatter-mean does, and only at or above the threshold."""
    k, v, threshold = merge(*by_hand(0.8), torch.tensor([NONE]))
    torch.testing.assert_close(k[0, 0, :2], torch.tensor([[(1 + 0.64) / 2, -0.8 * 0.6 / 2], [0.0, 1.0]]))
    torch.testing.assert_close(v[0, 0, :2], torch.tensor([[(2 + 8) / 2], [4.0]]))
    assert float(threshold) == pytest.approx(0.8)
    k, v, threshold = merge(*by_hand(0.8), torch.tensor([0.9]))  # 0.85 afterwards
    assert torch.equal(k, by_hand(0.8)[0]) and torch.equal(v, by_hand(0.8)[1])
    assert float(threshold) == pytest.approx(0.85)
    assert float(merge(*by_hand(0.8), torch.tensor([0.7]))[1][0, 0, 0]) == pytest.approx(5.0)


def test_equal_similarity_is_enough() -> None:
    """A single dropped token is its own mean: the first eviction of a decoding row merges, exactly."""
    for u in (0.1, 0.3, 0.7, 1 / 3):
        for threshold in (torch.tensor([NONE]), merge(*by_hand(u), torch.tensor([NONE]))[2]):
            assert not torch.equal(merge(*by_hand(u), threshold)[1], by_hand(u)[1])


def test_several_go_to_one_slot() -> None:
    k = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])[None, None]
    v = torch.tensor([[3.0], [6.0], [9.0], [1.0]])[None, None]
    kept = torch.tensor([[[True, False, False, True]]])
    new_k, new_v, _ = merge(k, v, kept, ~kept, torch.arange(4)[None, None], torch.tensor([NONE]))
    assert new_k[0, 0, 0].tolist() == [2.0, 0.0] and new_v[0, 0].tolist() == [[6.0], [6.0], [9.0], [1.0]]


def test_slot_order_is_free() -> None:
    """Exact ties (equal tokens have equal unrotated keys) go to the earlier position, whatever slot it lies in."""
    k, v, kept, victims, pos = draw(3)
    k[:, :, :4] = k[:, :, 4:5].nan_to_num(1.0)
    kept[:, :, :3], victims[:, :, :3], victims[:, :, 3], kept[:, :, 3] = True, False, True, False
    new_k, new_v, threshold = merge(k, v, kept, victims, pos, torch.full((B,), NONE))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    moved = merge(*(x[:, :, order] for x in (k, v, kept, victims, pos)), torch.full((B,), NONE))
    assert torch.equal(moved[0].nan_to_num(7), new_k[:, :, order].nan_to_num(7))
    assert torch.equal(moved[1], new_v[:, :, order])
    assert torch.equal(moved[2].nan_to_num(7), threshold.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_row_is_the_solo_row(dtype: torch.dtype) -> None:
    k, v, kept, victims, pos = draw(5, dtype)
    threshold = torch.tensor([NONE, 0.5, 0.5])
    together = merge(k, v, kept, victims, pos, threshold)
    for b in range(B):
        alone = merge(*(x[b : b + 1] for x in (k, v, kept, victims, pos)), threshold[b : b + 1])
        assert torch.equal(alone[0].nan_to_num(7)[0], together[0].nan_to_num(7)[b])
        assert torch.equal(alone[1][0], together[1][b])
        assert torch.equal(alone[2].nan_to_num(7)[0], together[2].nan_to_num(7)[b])
    # More capacity: dead slots behind.
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 9), value=float("nan")) for x in (k, v)]
    flags = [torch.nn.functional.pad(x, (0, 9)) for x in (kept, victims, pos)]
    padded = merge(*wide, *flags, threshold)
    assert torch.equal(padded[0][:, :, :N].nan_to_num(7), together[0].nan_to_num(7))
    assert torch.equal(padded[1][:, :, :N], together[1]) and torch.isnan(padded[1][:, :, N:]).all()
    assert torch.equal(padded[2].nan_to_num(7), together[2].nan_to_num(7))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*draw(6), torch.full((B,), NONE))
    whole = merge(*args)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    for x, y in zip(whole, merge(*args)):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


def test_nothing_to_merge_into() -> None:
    """Heads without a kept slot, keys of length 0 and broken keys: left alone, and not counted."""
    k, v, kept, victims, pos = by_hand(0.6)
    none = torch.zeros_like(kept)
    new_k, new_v, threshold = merge(k, v, none, ~none, pos, torch.tensor([NONE]))
    assert torch.equal(new_k, k) and torch.equal(new_v, v) and math.isnan(float(threshold))
    for broken in (0.0, float("nan"), float("inf")):
        for slot in (0, 2):
            bad = k.clone()
            bad[0, 0, slot] = broken
            new_k, _, threshold = merge(bad, v, kept, victims, pos, torch.tensor([0.25]))
            assert torch.equal(new_k.nan_to_num(7), bad.nan_to_num(7)), "u of the other kept key is negative"
            assert float(threshold) == pytest.approx(0.25 if slot == 2 else 0.5 * 0.25 + 0.5 * -0.8)
    args = (k[:, :, :0], v[:, :, :0], kept[..., :0], kept[..., :0], pos[..., :0], torch.tensor([0.5]))
    assert merge(*args)[0].shape == (1, 1, 0, 2) and float(merge(*args)[2]) == 0.5


def test_announced_number() -> None:
    k, v, kept, victims, pos = draw(7)
    most = int(victims.sum(-1).max())
    threshold = torch.full((B,), NONE)
    for x, y in zip(merge(k, v, kept, victims, pos, threshold, most), merge(k, v, kept, victims, pos, threshold)):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    with pytest.raises(ValueError, match=f"drops {most} slots, and at most {most - 1}"):
        merge(k, v, kept, victims, pos, threshold, most - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_has_the_same_bits(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 4, 600, 64, generator=g) + 0.5, torch.randn(2, 4, 600, 64, generator=g)
    role = torch.randint(0, 4, (2, 4, 600), generator=g)
    pos = torch.arange(600).expand(2, 4, 600).contiguous()
    args = (k.to(dtype), v.to(dtype), role > 1, role == 1, pos, torch.tensor([NONE, 0.5]))
    here = merge(*args)
    for most in (None, int((role == 1).sum(-1).max())):
        there = merge(*(x.cuda() for x in args), most)
        for x, y in zip(here, there):
            assert torch.equal(x, y.cpu())


@pytest.mark.parametrize("keep", [9, 6])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_no_query_sees_any_more_is_not_merged(keep: int, quantized: bool) -> None:
    """In a layer with a window of 6, of 13 tokens the 5 newest can be seen by the next; the others leave no trace, and the
    budget decides only if it is smaller than the window."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(1, HKV, 13, D, generator=g), torch.randn(1, HKV, 13, DV, generator=g)
    keep -= 2 if keep == 6 else 0
    table = torch.arange(1, 1 + 2 * HKV, dtype=torch.int32).reshape(1, HKV, 2)
    scores, places = torch.zeros(9, 8), torch.zeros(9, 8, 2, dtype=torch.int32)
    lens, threshold = torch.zeros(1, HKV, dtype=torch.int32), torch.full((1,), NONE)
    fresh = (
        torch.arange(13.0).expand(1, HKV, 13), None, torch.arange(13)[None], torch.arange(13)[None],
        torch.tensor([13], dtype=torch.int32), torch.full((1, HKV), keep, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    k_pages, v_pages = torch.zeros(9, 8, D), torch.zeros(9, 8, DV)
    if quantized:  # but nothing is: the tail is long enough
        tails = torch.zeros(1, HKV, 24, D), torch.zeros(1, HKV, 24, DV)
        codes = [torch.zeros(9, 8, n, dtype=torch.uint8) for n in (D, DV)]
        params = torch.zeros(9, 1, D, 2), torch.zeros(9, 8, 1, 2)
        torch.ops.kvrewrite.cache_update_quantized(
            k, v, *fresh, None, None, *codes, *params, scores, places, *tails, table, lens, torch.zeros_like(lens), "int8",
            8, 0, 6, 0, *[None] * 5, threshold,
        )  # fmt: skip
        stored = tails[0]
    else:
        torch.ops.kvrewrite.cache_update(
            k, v, *fresh, k_pages, v_pages, scores, places, table, lens, 0, 6, 0, *[None] * 5, threshold
        )
        stored = torch.ops.kvrewrite.read_pages(k_pages, table)
    assert lens.tolist() == [[min(keep, 5)] * HKV]
    if keep >= 5:
        assert torch.equal(stored[:, :, :5], k[:, :, 8:]) and bool(threshold.isnan())
    else:  # one token that could still be seen goes
        seen = torch.arange(13) >= 8
        kept, victims = (x.expand(1, HKV, 13) for x in (torch.arange(13) >= 9, seen & (torch.arange(13) < 9)))
        expected, _, mean = merge(k, v, kept, victims, torch.arange(13).expand(1, HKV, 13), torch.full((1,), NONE))
        assert torch.equal(stored[:, :, :4], expected[:, :, 9:]) and torch.equal(threshold, mean)
