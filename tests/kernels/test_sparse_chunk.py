"""The kernels of sparse prefill against the references, in the interpreter or on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvrewrite.kernels.attention import reference, sparse_index
from kvrewrite.kernels.attention.sparse_chunk import attend_visible, together
from kvrewrite.kernels.attention.sparse_sums import last_sums
from kvrewrite.kernels.groups import At, Logits, Placed, Slots, Tokens, VisibleBlocks
from kvrewrite.ops.dispatch import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter's tl.dot has no bf16


class Case:
    """A chunk on a cache: strided new tokens; dead slots and padding are NaN."""

    def __init__(self, lens: list[list[int]], valid: list[int], group: int = 2, c: int = 128, t: int = 150, d: int = 32,
                 dv: int = 0, dtype: torch.dtype = torch.float32, sinks: bool = False, hidden: bool = False,
                 softcap: float = 0.0):  # fmt: skip
        b, hkv, dv = len(lens), len(lens[0]), dv or d
        h, g = hkv * group, torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(DEVICE, dtype)

        live, real = torch.tensor(lens), torch.tensor(valid)
        q, k, v = (normal(b, t, n * m).view(b, t, n, m).transpose(1, 2) for n, m in ((h, d), (hkv, d), (hkv, dv)))
        k_cache, v_cache = normal(b, hkv, c, d), normal(b, hkv, c, dv)
        for x in (k_cache, v_cache):
            x[torch.arange(c) >= live[..., None]] = math.nan
        for x in (q, k, v):
            x.transpose(1, 2)[torch.arange(t) >= real[:, None]] = math.nan
        wide = torch.stack([live, live], -1).int().to(DEVICE)  # the last stride is the layers'
        self.tokens, self.slots = Tokens(q, k, v), Slots(k_cache, v_cache, wide[..., 0])
        self.at = At((live.max() + torch.arange(t)).expand(b, t).to(DEVICE), real.int().to(DEVICE))
        shut = (torch.rand(b, hkv, t, generator=g) < 0.3).to(DEVICE) if hidden else None
        extra = torch.randn(h, generator=g).to(DEVICE) if sinks else None
        self.logits = Logits(extra, None, shut, d**-0.5, softcap)

    def real_rows(self) -> Tensor:
        t = self.tokens.q.shape[2]
        return (torch.arange(t, device=DEVICE) < self.at.valid[:, None])[:, None].expand(self.tokens.q.shape[:3])

    def expected(self, visible: VisibleBlocks) -> tuple[Tensor, Tensor]:
        """The reference in float64."""
        (q, k, v), (k_cache, v_cache, lens, _) = self.tokens, self.slots
        b, hkv, t = k.shape[:3]
        live = torch.arange(k_cache.shape[2], device=DEVICE) < lens[..., None]
        arrived = (torch.arange(t, device=DEVICE) < self.at.valid[:, None])[:, None].expand(b, hkv, t)
        places = torch.cat([torch.zeros_like(live, dtype=torch.int64), self.at.positions[:, None].expand(b, hkv, t)], 2)
        logits = self.logits
        if logits.hidden is not None:
            logits = logits._replace(hidden=pad(logits.hidden, (k_cache.shape[2], 0)))
        keys, values = torch.cat([k_cache, k], 2).double(), torch.cat([v_cache, v], 2).double()
        placed = Placed(self.at.positions, places, torch.cat([live, arrived], 2))
        return reference.attend(Tokens(q.double(), keys, values), placed, logits, own=True, visible=visible)

    def attend(self, visible: VisibleBlocks) -> tuple[Tensor, Tensor]:
        (q, k, v), slots = self.tokens, self.slots
        spare = (0, 0, 0, -q.shape[2] % 64)  # rows that are never read
        keys, values = (pad(together(*x), spare, value=math.nan) for x in ((slots.k_cache, k), (slots.v_cache, v)))
        return attend_visible(q, keys, values, visible, slots.lens, self.at, self.logits)


def random_visible(case: Case, share: float, columns: int) -> VisibleBlocks:
    """Blocks and columns without any order, the blocks of a query's own block of queries among them."""
    g = torch.Generator().manual_seed(5)
    (b, h, t, _), c = case.tokens.q.shape, case.slots.k_cache.shape[2]
    n_q, n_k = -(-t // 128), sparse_index.key_blocks(c, t)
    blocks = torch.rand(b, h, n_q, n_k, generator=g) < share
    for i in range(n_q):
        blocks[:, :, i, -(-c // 64) + 2 * i : -(-c // 64) + 2 * i + 2] = True
    new = -(-c // 64) * 64
    taken = torch.stack([torch.randperm(new + t, generator=g)[:columns] for _ in range(b * h)]).view(b, h, columns)
    taken = taken.sort(2).values.int()
    taken[:, ::2, columns // 2 :] = -1
    # What is dead or beyond a row's end is never chosen.
    found = sparse_index.possible(sparse_index._frame(case.tokens, case.slots, case.at)).cpu()
    return VisibleBlocks((blocks & found).to(DEVICE), taken.to(DEVICE))


def check(case: Case, visible: VisibleBlocks) -> None:
    """Output and log-sum-exp of the real rows are the reference's, those of padding 0 and -inf."""
    (out, lse), (want, want_lse), real = case.attend(visible), case.expected(visible), case.real_rows()
    dtype = case.tokens.q.dtype
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    assert torch.equal(out[~real], torch.zeros_like(out[~real])) and torch.isneginf(lse[~real]).all()
    out, want = out[real].double(), want[real]
    if out.numel():
        assert (out - want).norm() <= TOLERANCE[dtype] * want.norm()
    torch.testing.assert_close(lse[real], want_lse[real], atol=2e-5 if dtype == torch.float32 else 2e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        {"lens": [[128]], "valid": [150]},
        {"lens": [[70, 128], [0, 5]], "valid": [150, 97], "group": 1},
        {"lens": [[0]], "valid": [140], "c": 0, "group": 4},
        {"lens": [[64], [1]], "valid": [150, 0], "group": 3, "d": 24, "dv": 40},
        {"lens": [[100]], "valid": [130], "sinks": True, "softcap": 5.0},
        {"lens": [[100]], "valid": [150], "hidden": True},
    ],
    ids=["full", "ragged", "no cache", "odd dims", "sinks, softcap", "gated"],
)
def test_attention_on_what_is_visible(shape: dict[str, Any], dtype: torch.dtype) -> None:
    case = Case(**shape, dtype=dtype)
    check(case, random_visible(case, 0.4, 40))


@pytest.mark.parametrize("kind", ["nothing", "all blocks", "all columns"])
def test_extremes(kind: str) -> None:
    """Only a query's own blocks; all blocks and all columns; columns alone."""
    case = Case([[100]], [150])
    visible = random_visible(case, 1.0 if kind == "all blocks" else 0.0, 1)
    if kind != "nothing":
        every = torch.arange(128 + 150, dtype=torch.int32, device=DEVICE).expand(1, 2, -1)
        visible = visible._replace(columns=every)
    else:
        visible = visible._replace(columns=visible.columns[..., :0])  # type: ignore[index]
    check(case, visible)
    if kind != "nothing":
        dense = VisibleBlocks(torch.ones_like(visible.blocks), torch.empty_like(visible.columns[..., :0]))  # type: ignore[arg-type, index]
        want, want_lse = case.expected(dense)
        out, lse = case.attend(visible)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        {"lens": [[70, 128], [0, 5]], "valid": [150, 97]},
        {"lens": [[0]], "valid": [150], "c": 0},
        {"lens": [[100], [128]], "valid": [150, 20], "sinks": True, "softcap": 5.0},
        {"lens": [[100]], "valid": [150], "hidden": True},
    ],
    ids=["ragged", "no cache", "sinks, softcap", "gated"],
)
def test_sums_of_the_last_queries(shape: dict[str, Any], dtype: torch.dtype) -> None:
    case = Case(**shape, dtype=dtype)
    wide = Tokens(*(x.double() for x in case.tokens))
    slots = case.slots._replace(k_cache=case.slots.k_cache.double())
    want = sparse_index.last_sums(wide, slots, case.at, case.logits)
    keys = pad(together(case.slots.k_cache, case.tokens.k), (0, 0, 0, 7), value=math.nan)
    got = last_sums(case.tokens.q, keys, case.slots.lens, case.at, case.logits)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3 if dtype == torch.float16 else 5e-2
    for name in ("columns", "cached", "new"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=tolerance, atol=tolerance)


def through_op(case: Case, patterns: str, mode: str, dense: bool = False) -> tuple[Tensor, Tensor]:
    """`cached_attention` with the cache on pages. dense: keys beside them, as where they are rotated first."""
    (q, k, v), (k_cache, v_cache, lens, _) = case.tokens, case.slots
    b, hkv, c, _ = k_cache.shape
    table = 1 + torch.arange(b * hkv * c // 64, dtype=torch.int32, device=DEVICE).view(b, hkv, c // 64)
    pools = [torch.cat([x.new_zeros(1, 64, x.shape[3]), x.reshape(-1, 64, x.shape[3])]) for x in (k_cache, v_cache)]
    places = torch.zeros(len(pools[0]), 64, 2, dtype=torch.int32, device=DEVICE)
    sinks, alibi, hidden, *shape = case.logits
    with kernels(mode):
        out, lse = torch.ops.kvrewrite.cached_attention(
            q,
            k,
            v,
            k_cache if dense else None,
            *pools,
            places,
            table,
            lens,
            *case.at,
            sinks,
            alibi,
            hidden,
            *shape,
            None,
            patterns,
        )
    return out, lse


@pytest.mark.parametrize(
    "patterns",
    ["vertical_slash:34:40,a_shape:3:20", "block_sparse:1,block_sparse:2", "vertical_slash:60:33,dense"],
)
@pytest.mark.parametrize("dense", [False, True])
def test_the_op_chooses_and_attends_alike(patterns: str, dense: bool) -> None:
    case = Case([[70], [128]], [150, 60])
    real = case.real_rows()
    (out, lse), (want, want_lse) = (through_op(case, patterns, mode, dense) for mode in ("fused", "reference"))
    torch.testing.assert_close(out[real], want[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[real], want_lse[real], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_size_on_a_gpu(d: int, dtype: torch.dtype) -> None:
    """Tiles as they are compiled, grouped queries, many blocks and columns."""
    case = Case([[1500, 2048], [100, 0]], [1000, 700], group=4, c=2048, t=1000, d=d, dtype=dtype)
    check(case, random_visible(case, 0.2, 300))
    patterns = "vertical_slash:200:100,a_shape:100:200,block_sparse:8,vertical_slash:35:300," * 2
    (out, lse), real = through_op(case, patterns[:-1], "fused"), case.real_rows()
    assert torch.isfinite(out[real]).all() and torch.isfinite(lse[real]).all()
    dense, dense_lse = through_op(case, "", "fused")
    every, every_lse = through_op(case, ",".join(["block_sparse:999", "vertical_slash:9999:1"] * 4), "fused")
    assert (every - dense)[real].double().norm() <= 2 * TOLERANCE[dtype] * dense[real].double().norm()
    torch.testing.assert_close(every_lse[real], dense_lse[real], atol=2e-3, rtol=1e-5)
