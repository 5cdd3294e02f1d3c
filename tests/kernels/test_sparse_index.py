"""What the heads of a chunk see in sparse prefill, and attention on that, against tests/support/sparse_oracle.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kvrewrite.ops  # noqa: F401  (registers the ops)
from kvrewrite.errors import OptionError
from kvrewrite.kernels.attention.patterns import HeadPattern, parse
from kvrewrite.kernels.attention.sparse_index import find_visible, visible_keys
from kvrewrite.kernels.groups import At, Logits, Slots, Tokens
from tests.support import sparse_oracle as oracle

ops = torch.ops.kvrewrite
GROUP, HKV, D, DV = 2, 2, 16, 8
H = GROUP * HKV
EVERYTHING = [
    "vertical_slash:100000:1",
    "vertical_slash:1:100000",
    "a_shape:1:100000",
    "a_shape:100000:1",
    "block_sparse:100000",
    "dense",
]
# Name -> (live slots per row and kv head, real new tokens per row, new tokens)
CHUNKS: dict[str, tuple[list[list[int]], list[int], int]] = {
    "whole": ([[0, 0]], [200], 200),
    "full cache": ([[128, 128]], [300], 300),
    "ragged": ([[70, 128], [5, 0]], [193, 130], 193),
    "short rows": ([[100, 100], [64, 64], [0, 0]], [140, 50, 0], 140),
}
HOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "gated": {"hidden": True},
}


class Chunk:
    """A chunk of new tokens on a cache of 128 slots. What is dead or padding is NaN."""

    def __init__(self, name: str, how: str = "plain", dtype: torch.dtype = torch.float64):
        self.lens, self.valid, t = CHUNKS[name]
        b, capacity = len(self.valid), 0 if name == "whole" else 128
        g = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        q, k, v = normal(b, H, t, D) * 2, normal(b, HKV, t, D), normal(b, HKV, t, DV)
        k_cache, v_cache = normal(b, HKV, capacity, D), normal(b, HKV, capacity, DV)
        for i, (row, real) in enumerate(zip(self.lens, self.valid, strict=True)):
            for x in (q, k, v):
                x[i, :, real:] = math.nan
            for h, live in enumerate(row):
                k_cache[i, h, live:] = math.nan
                v_cache[i, h, live:] = math.nan
        self.tokens, lens = Tokens(q, k, v), torch.tensor(self.lens, dtype=torch.int32)
        self.slots = Slots(k_cache, v_cache, lens)
        seen = torch.tensor([max(row) for row in self.lens])[:, None]
        self.at = At(seen + torch.arange(t), torch.tensor(self.valid, dtype=torch.int32))
        given = HOWS[how]
        self.sinks = normal(H) if given.get("sinks") else None
        self.hidden = torch.rand(b, HKV, t, generator=g) < 0.3 if given.get("hidden") else None
        self.logits = Logits(self.sinks, None, self.hidden, 0.4, given.get("softcap", 0.0))

    def of_head(self, b: int, h: int) -> tuple[Tensor, Tensor, Tensor, int, dict[str, Any]]:
        """Queries, keys and values of one head without padding, live slots, and how it attends."""
        kv, real = h // GROUP, self.valid[b]
        live = self.lens[b][kv]
        keys, values = (
            torch.cat([cache[b, kv, :live], new[b, kv, :real]])
            for cache, new in ((self.slots.k_cache, self.tokens.k), (self.slots.v_cache, self.tokens.v))
        )
        how = {"scale": self.logits.scale, "softcap": self.logits.softcap}
        how |= {"sink": None if self.sinks is None else self.sinks[h]}
        how |= {"hidden": None if self.hidden is None else self.hidden[b, kv]}
        return self.tokens.q[b, h, :real], keys, values, live, how

    def ranks(self, b: int, h: int) -> Tensor:
        """Places of one head's keys among [slots, new tokens]."""
        capacity, live = self.slots.k_cache.shape[2], self.lens[b][h // GROUP]
        return torch.cat([torch.arange(live), capacity + torch.arange(self.valid[b])])

    def pages(self) -> tuple[Tensor, ...]:
        """The cache on pages of 64 slots: k, v, positions, table, lens."""
        b, _, capacity, _ = self.slots.k_cache.shape
        count = capacity // 64
        table = 1 + torch.arange(b * HKV * count, dtype=torch.int32).view(b, HKV, count)
        k, v = (
            torch.cat([torch.full((1, 64, x.shape[3]), math.nan, dtype=x.dtype), x.reshape(-1, 64, x.shape[3])])
            for x in self.slots[:2]
        )
        places = torch.arange(64).view(1, 64, 1).expand(len(k), 64, 2).contiguous().int()
        return k, v, places % max(1, min(x for row in self.lens for x in row)), table, self.slots.lens

    def attend(self, patterns: str) -> tuple[Tensor, Tensor]:
        (q, k, v), (sinks, alibi, hidden, *shape) = self.tokens, self.logits
        out, lse = ops.cached_attention(
            q, k, v, None, *self.pages(), *self.at, sinks, alibi, hidden, *shape, None, patterns
        )
        return out, lse


SETS = {
    "columns": "vertical_slash:34:1,vertical_slash:60:30,vertical_slash:1:35,vertical_slash:31:33",
    "diagonals": "vertical_slash:30:31,vertical_slash:2:40,vertical_slash:30:60,dense",
    "a_shape": "a_shape:1:1,a_shape:65:70,a_shape:140:1,a_shape:3:200",
    "blocks": "block_sparse:1,block_sparse:2,dense,block_sparse:3",
    "mixed": "a_shape:5:40,vertical_slash:33:32,block_sparse:2,dense",
}


CASES = [("ragged", "plain", name) for name in SETS]
CASES += [("ragged", how, name) for how in ("softcap", "gated", "sinks") for name in ("columns", "mixed")]
CASES += [("whole", "plain", "diagonals"), ("full cache", "plain", "mixed"), ("short rows", "plain", "mixed")]


@pytest.mark.parametrize(("chunk", "how", "name"), CASES)
def test_each_head_sees_what_the_paper_says(chunk: str, how: str, name: str) -> None:
    """Which keys every query sees, and attention on these."""
    c, patterns = Chunk(chunk, how), SETS[name]
    visible = find_visible(patterns, c.tokens, c.slots, c.at, c.logits)
    t, capacity = c.tokens.q.shape[2], c.slots.k_cache.shape[2]
    seen = visible_keys(visible, 0, t, capacity, t)
    out, lse = c.attend(patterns)
    for b, real in enumerate(c.valid):
        for h, word in enumerate(patterns.split(",")):
            q, keys, values, live, how_ = c.of_head(b, h)
            want = oracle.visible(word, q, keys, live, how_)
            causal = torch.ones_like(want).tril(live)
            got = seen[b, h, :real][:, c.ranks(b, h)] & causal
            assert torch.equal(got, want), (b, h, word, (got != want).nonzero()[:4])
            expected, norm = oracle.attend(q, keys, values, live, want, how_)
            torch.testing.assert_close(out[b, h, :real], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(lse[b, h, :real].double(), norm, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", EVERYTHING)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_covers_everything_is_dense(chunk: str, word: str) -> None:
    c = Chunk(chunk)
    patterns = ",".join([word] * H)
    dense, sparse = c.attend(""), c.attend(patterns)
    for got, want in zip(sparse, dense, strict=True):
        for b, real in enumerate(c.valid):
            assert torch.equal(got[b, :, :real], want[b, :, :real])


def test_diagonals_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many blocks of queries are looked at together does not matter."""
    c = Chunk("full cache")
    whole = find_visible(SETS["diagonals"], c.tokens, c.slots, c.at, c.logits)
    monkeypatch.setattr("kvrewrite.kernels.attention.sparse_index.AT_ONCE", 1)
    parts = find_visible(SETS["diagonals"], c.tokens, c.slots, c.at, c.logits)
    for one, other in zip(whole, parts, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_rows_are_as_alone() -> None:
    """A row of a padded batch sees what it does alone, also beside rows of longer caches."""
    c = Chunk("ragged")
    patterns = SETS["mixed"]
    together, _ = c.attend(patterns)
    for b, real in enumerate(c.valid):
        alone = Chunk("ragged")
        cut = slice(b, b + 1)
        alone.lens, alone.valid = c.lens[cut], c.valid[cut]
        alone.tokens = Tokens(*(x[cut, :, :real] for x in c.tokens))
        alone.slots = Slots(*(x[cut] for x in c.slots[:3]))
        alone.at = At(c.at.positions[cut, :real], c.at.valid[cut])
        out, _ = alone.attend(patterns)
        torch.testing.assert_close(out[0], together[b, :, :real], rtol=1e-12, atol=1e-12)


def test_patterns_as_text() -> None:
    found = parse("vertical_slash:1000:6096,a_shape:4:128,block_sparse:100,dense")
    assert found == (
        HeadPattern("vertical_slash", 1000, 6096),
        HeadPattern("a_shape", 4, 128),
        HeadPattern("block_sparse", 100),
        HeadPattern("dense"),
    )
    assert ",".join(map(str, found)) == "vertical_slash:1000:6096,a_shape:4:128,block_sparse:100,dense"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("slash:1:2", "got 'slash', expected one of vertical_slash"),
        ("vertical_slash:1", "got 1 numbers, expected 2, as in vertical_slash:1000:6096"),
        ("block_sparse:0", "expected whole numbers from 1 on"),
        ("a_shape:1:-3", "expected whole numbers from 1 on"),
        ("dense,", "got '', expected one of"),
    ],
)
def test_patterns_that_make_no_sense(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_patterns_of_other_attention() -> None:
    c = Chunk("ragged")
    with pytest.raises(ValueError, match="patterns of 2 heads for attention of 4"):
        c.attend("dense,dense")
    c.logits = c.logits._replace(window=9)
    with pytest.raises(OptionError, match="expected causal attention for patterns; got a window"):
        c.attend(SETS["mixed"])
