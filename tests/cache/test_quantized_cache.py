"""Quantized caches against dicts and lists: where tokens go, and what is left of their keys and values."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import Codes, Eviction, NewTokens, QuantizedCache, Ragged, Rows
from kvrewrite.kernels.quantized.reference import Pools, cache_update, place
from kvrewrite.kernels.quantized.scheme import KINDS, Scheme
from tests.support.products import pairwise
from tests.support.slow_cache import SlowHead

B, HKV, D, DV, PAGE = 2, 2, 6, 4, 8


@pytest.mark.parametrize("residual", [0, 4, 12])
@pytest.mark.parametrize("seed", range(6))
def test_place(seed: int, residual: int) -> None:
    """Random heads, some empty, some that lose nearly all, several times over."""
    rng, group, width = random.Random(seed), 4, 48
    heads = [[SlowHead("int8", group, residual) for _ in range(3)] for _ in range(4)]
    seen = 0
    for step in range(12):
        n = rng.choice([1, 1, 1, 3, 9, 17])
        kept = torch.zeros(4, 3, width + n, dtype=torch.bool)
        pos = torch.full((4, 3, width + n), 10**6, dtype=torch.int32)
        qlens = torch.zeros(4, 3, dtype=torch.int32)
        pos[..., width:] = seen + torch.arange(n)
        befores = []
        for b, row in enumerate(heads):
            for h, head in enumerate(row):
                before = head.order() + [seen + t for t in range(n)]
                qlens[b, h] = len(head.slots)
                share = rng.choice([0.0, 0.2, 0.9, 0.97, 1.0, 1.0])
                stays = [i for i in range(len(before)) if rng.random() < share][-width:]
                for i, position in enumerate(before):
                    where = i if i < len(before) - n else width + i - (len(before) - n)
                    pos[b, h, where], kept[b, h, where] = position, i in stays
                befores.append((head, {before[i] for i in stays}))
        source, q = place(kept, pos, qlens, residual, group, width)
        assert source.shape == (4, 3, width) and q.shape == (4, 3)
        for (head, stays), index, slots, at in zip(befores, source.flatten(0, 1), q.flatten(), pos.flatten(0, 1)):
            head.step(stays, {seen + t: ([0.0], [0.0]) for t in range(n)})
            expected = head.order()
            assert int(slots) == len(head.slots), f"step {step}"
            assert at[index[: len(expected)]].tolist() == expected, f"step {step}"
            assert bool((index[len(expected) :] == -1).all())
        seen += n


class Cache:
    """A paged quantized cache whose unused parts are NaN, with pages handed out at random."""

    def __init__(self, scheme: Scheme, residual: int, per_head: int, seed: int, dtype: torch.dtype = torch.float64):
        total, nan = 1 + (B + 1) * HKV * per_head, math.nan
        self.scheme, self.generator = scheme, torch.Generator().manual_seed(seed)
        p = scheme.parameters
        wide = residual + scheme.group
        self.keys = Pools(
            torch.full((total, PAGE, scheme.code_width(D)), 171, dtype=torch.uint8),
            torch.full((total, PAGE // scheme.group, D, p), nan, dtype=dtype),
            torch.full((B, HKV, wide, D), nan, dtype=dtype),
        )
        self.values = Pools(
            torch.full((total, PAGE, scheme.code_width(DV)), 171, dtype=torch.uint8),
            torch.full((total, PAGE, DV // scheme.value_group(DV), p), nan, dtype=dtype),
            torch.full((B, HKV, wide, DV), nan, dtype=dtype),
        )
        self.scores = torch.full((total, PAGE), nan)
        self.pos = torch.full((total, PAGE, 2), 12345, dtype=torch.int32)
        shuffled = (torch.randperm(total - 1, generator=self.generator) + 1).int()
        self.table = shuffled[: B * HKV * per_head].reshape(B, HKV, per_head)
        self.unused = shuffled[B * HKV * per_head :]
        self.lens, self.qlens = (torch.zeros(B, HKV, dtype=torch.int32) for _ in range(2))
        self.seen = [0] * B

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of all slots."""
        return (
            self.keys.read(self.table, self.qlens, self.scheme, False),
            self.values.read(self.table, self.qlens, self.scheme, True),
            pages.read(self.pos, self.table),
        )

    def update(
        self, k: Tensor, v: Tensor, valid: list[int], keep: int, deal: bool = False, given: bool = False
    ) -> None:
        """Tokens with random scores. deal: row 0 gets new pages; given: with what has been read already."""
        t = k.shape[2]
        positions = torch.tensor(self.seen)[:, None] + torch.arange(t)
        read = self.dense() if given else (None, None, None)
        spare = next_table = None
        if deal:
            offered = torch.cat([self.table[0].flatten(), self.unused])
            offered = offered[torch.randperm(len(offered), generator=self.generator)]
            count = self.table[0].numel()
            spare = torch.full((B, count), -1, dtype=torch.int32)
            spare[0] = offered[:count]
            next_table = torch.zeros(B, HKV, count, dtype=torch.int32)
        limits = torch.full((B, HKV), keep, dtype=torch.int32), torch.full((B,), 2, dtype=torch.int32)
        cache_update(
            NewTokens(k, v, torch.randn(B, HKV, t, generator=self.generator)),
            Rows(positions, positions + 7, torch.tensor(valid, dtype=torch.int32), *limits),
            QuantizedCache(self.scores, self.pos, self.table, self.lens, self.qlens, *read[:2]),
            Codes(
                *(
                    x
                    for name in ("codes", "params", "tail")
                    for x in (getattr(self.keys, name), getattr(self.values, name))
                )
            ),
            self.scheme,
            Eviction(protected_first=1),
            Ragged(spare=spare, next_table=next_table),
        )
        if next_table is not None:
            need = (-(-self.lens[0] // PAGE)).tolist()
            dealt = [next_table[0, h, :n].tolist() for h, n in enumerate(need)]
            rest = [p for p in offered.tolist() if p not in [*dealt[0], *dealt[1]]]
            for h, mine in enumerate(dealt):  # and more, so that the head can grow again
                assert all(mine)
                more = [rest.pop() for _ in range(self.table.shape[2] - len(mine))]
                self.table[0, h] = torch.tensor(mine + more, dtype=torch.int32)
            self.unused = torch.tensor(rest, dtype=torch.int32)
        self.seen = [s + n for s, n in zip(self.seen, valid)]


@pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [0, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_forty_steps(seed: int, residual: int, kind: str) -> None:
    """Prompts, decoding with and without eviction, rows that pause, pages dealt anew: everything that is stored."""
    rng = random.Random(seed)
    scheme = Scheme(kind, 4)
    cache = Cache(scheme, residual, 6, seed)
    heads = [[SlowHead(kind, 4, residual) for _ in range(HKV)] for _ in range(B)]
    dealt = 0
    for step in range(40):
        t = rng.choice([1, 1, 1, 1, 5, 11]) if step else 19
        valid = [t, t] if step % 5 else [t, rng.randrange(t + 1)]
        if step % 7 == 6:
            valid = [0, t]
        longest = int(cache.lens.max()) + t
        keep = min(rng.choice([48, 20, 20, 20, 9]), 48)
        keep = keep if longest > 48 else rng.choice([keep, 48])
        k = torch.randn(B, HKV, t, D, generator=cache.generator).double() * 3 + torch.arange(D)
        v = torch.randn(B, HKV, t, DV, generator=cache.generator).double()
        for b in range(B):
            k[b, :, valid[b] :] = v[b, :, valid[b] :] = math.nan
        before = [c.clone() for c in (cache.keys.codes, cache.keys.params, cache.values.codes, cache.values.params)]
        was, seen = cache.table.clone(), list(cache.seen)
        deal = step % 6 == 5
        dealt += deal
        cache.update(k, v, valid, keep, deal, given=step % 2 == 0)
        dense_k, dense_v, dense_pos = cache.dense()
        written = torch.zeros(len(cache.pos), dtype=torch.bool)
        for b, row in enumerate(heads):
            for h, head in enumerate(row):
                n, kept = int(cache.lens[b, h]), dense_pos[b, h, : int(cache.lens[b, h]), 0].tolist()
                new = {seen[b] + i: (k[b, h, i].tolist(), v[b, h, i].tolist()) for i in range(valid[b])}
                head.step(kept, new)
                assert head.order() == kept and int(cache.qlens[b, h]) == len(head.slots), f"step {step}"
                assert n <= max(keep, 2) or valid[b] == 0
                for s, position in enumerate(kept):
                    assert dense_pos[b, h, s, 1] == position + 7
                    for got, expected in ((dense_k, head.keys), (dense_v, head.values)):
                        assert got[b, h, s].tolist() == pytest.approx(expected[position], rel=1e-12, abs=1e-12)
                for g in head.recoded:
                    written[cache.table[b, h, g * 4 // PAGE]] = True
            if deal and b == 0:
                written[cache.table[b].flatten()] = True
        # Whole pages that no token joined and none was dealt to are as they were.
        for pool, old in zip((cache.keys.codes, cache.keys.params, cache.values.codes, cache.values.params), before):
            mine = (was > 0) & ~written[was.long()] if not deal else torch.zeros_like(was, dtype=torch.bool)
            ours = was[mine].long()
            assert torch.equal(
                torch.nan_to_num(pool[ours].float(), nan=-7), torch.nan_to_num(old[ours].float(), nan=-7)
            )
    assert dealt >= 6 and int(cache.lens.max()) > 8


def test_decoding_codes_one_group() -> None:
    """While nothing is evicted a generated token costs nothing but the tail, until a group is full; then one group."""
    cache = Cache(Scheme("int8", 4), 4, 6, 0)
    k, v = torch.randn(B, HKV, 40, D).double(), torch.randn(B, HKV, 40, DV).double()
    cache.update(k[:, :, :12], v[:, :, :12], [12, 12], 99)
    changes = []
    for t in range(12, 40):
        before = cache.keys.codes.clone(), cache.keys.params.clone()
        cache.update(k[:, :, t : t + 1], v[:, :, t : t + 1], [1, 1], 99)
        changes.append(
            int((torch.nan_to_num(cache.keys.params, nan=-7) != torch.nan_to_num(before[1], nan=-7)).any((2, 3)).sum())
        )
    assert changes == [0, 0, 0, 4] * 7  # heads times rows
    assert cache.qlens.tolist() == [[36, 36]] * B and cache.lens.tolist() == [[40, 40]] * B


def test_residual_as_long_as_the_text_is_exact() -> None:
    """Nothing is ever quantized."""
    cache = Cache(Scheme("int4", 4), 40, 6, 1)
    k, v = torch.randn(B, HKV, 40, D).double(), torch.randn(B, HKV, 40, DV).double()
    for at, n in ((0, 17), (17, 1), (18, 1), (19, 13), (32, 1)):
        cache.update(k[:, :, at : at + n], v[:, :, at : at + n], [n, n], 99)
    got_k, got_v, pos = cache.dense()
    assert cache.qlens.max() == 0 and pos[0, 0, :33, 0].tolist() == list(range(33))
    assert torch.equal(got_k[:, :, :33], k[:, :, :33]) and torch.equal(got_v[:, :, :33], v[:, :, :33])
