"""What the last queries of a chunk attend to, summed by key and by diagonal, in kernels: `sparse_index.last_sums`.

Three launches: each query's sum of exponentials over parts of the keys; its weights, summed by key and written down,
each query moved by as many columns as it is older than the newest; and the sums of those columns, which are diagonals.
Nothing is added atomically, so the same call gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.attention.patterns import KEY_BLOCK, LAST_QUERIES
from kvrewrite.kernels.attention.sparse_index import Sums
from kvrewrite.kernels.groups import At, Logits

SPLITS = 16  # parts of the keys, programs of a head in the first launch


@triton.jit
def _queries(Q, VALID, b, h, t, q_b, q_h, q_t, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """The last queries of a row's head, how many of its tokens are real, and each query's place (negative: none)."""
    n_valid = tl.minimum(tl.load(VALID + b), t)
    places = n_valid - ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, D_PAD)
    at = Q + b * q_b + h * q_h + places[:, None].to(tl.int64) * q_t + channels[None, :]
    return tl.load(at, mask=(places >= 0)[:, None] & (channels < D)[None, :], other=0.0), n_valid, places


@triton.jit
def _logits(
    q, K, keys, places, n_live, n_valid, capacity, size, HIDDEN_PTR, scale, softcap,
    D: tl.constexpr, D_PAD: tl.constexpr, SOFTCAP: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the queries on some keys, in powers of 2; -inf where they see nothing."""
    new = keys - capacity
    real = (keys < size) & tl.where(new < 0, keys < n_live, new < n_valid)
    channels = tl.arange(0, D_PAD)
    at = K + keys[:, None].to(tl.int64) * D + channels[None, :]
    k = tl.load(at, mask=real[:, None] & (channels < D)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if SOFTCAP:
        s = softcap * (1.0 - 2.0 / (tl.exp2(s / softcap * 2.8853900817779268) + 1.0))
    seen = real[None, :] & (new[None, :] <= places[:, None]) & (places >= 0)[:, None]
    if HIDDEN:
        shut = tl.load(HIDDEN_PTR + new, mask=real & (new >= 0), other=0).to(tl.int32)
        seen = seen & ((shut == 0)[None, :] | (new[None, :] == places[:, None]))
    return tl.where(seen, s * 1.4426950408889634, float("-inf"))


@triton.jit(do_not_specialize=["lens_b", "lens_h", "t", "size", "per_split"])
def _sum_parts(
    Q, K, LENS, VALID, HIDDEN_PTR, PARTS, scale, softcap, q_b, q_h, q_t, lens_b, lens_h, hidden_b, hidden_h,
    n_heads, group, t, size, key_rows, per_split,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PARTS_OF_HEAD: tl.constexpr, ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the largest logit of each query over a part of the keys, and the sum of exponentials below it."""
    split, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), (bh % n_heads).to(tl.int64)
    hk = h // group
    q, n_valid, places = _queries(Q, VALID, b, h, t, q_b, q_h, q_t, D, D_PAD, ROWS)
    n_live = tl.load(LENS + b * lens_b + hk * lens_h)
    keys = K + (b * (n_heads // group) + hk) * key_rows * D
    hidden = HIDDEN_PTR + b * hidden_b + hk * hidden_h
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    for start in tl.range(split * per_split, tl.minimum(size, (split + 1) * per_split), BLOCK):
        s = _logits(q, keys, start + tl.arange(0, BLOCK), places, n_live, n_valid, size - t, size, hidden, scale, softcap,
                    D, D_PAD, SOFTCAP, HIDDEN, PRECISION)  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        m_i = m_new
    at = PARTS + (bh * PARTS_OF_HEAD + split) * 2 * ROWS + tl.arange(0, ROWS)
    tl.store(at, m_i)
    tl.store(at + ROWS, l_i)


@triton.jit(do_not_specialize=["lens_b", "lens_h", "t", "size"])
def _weigh(
    Q, K, LENS, VALID, HIDDEN_PTR, SINK, PARTS, COLUMNS, MOVED, scale, softcap,
    q_b, q_h, q_t, lens_b, lens_h, hidden_b, hidden_h, n_heads, group, t, size, key_rows,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PARTS_OF_HEAD: tl.constexpr, ROWS: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the weights of one tile of keys."""
    bh = tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), (bh % n_heads).to(tl.int64)
    hk = h // group
    capacity = size - t
    q, n_valid, places = _queries(Q, VALID, b, h, t, q_b, q_h, q_t, D, D_PAD, ROWS)
    n_live = tl.load(LENS + b * lens_b + hk * lens_h)
    rows = tl.arange(0, ROWS)
    parts = PARTS + bh * PARTS_OF_HEAD * 2 * ROWS + tl.arange(0, PARTS_OF_HEAD)[:, None] * (2 * ROWS) + rows[None, :]
    most = tl.load(parts)
    sums = tl.load(parts + ROWS)
    m_i = tl.max(most, 0)
    if SINKS:
        sink = tl.load(SINK + h).to(tl.float32) * 1.4426950408889634
        m_i = tl.maximum(m_i, sink)
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = tl.sum(sums * tl.exp2(most - shift[None, :]), 0)
    if SINKS:
        l_i += tl.exp2(sink - shift)
    norm = shift + tl.log2(tl.where(l_i > 0.0, l_i, 1.0))
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    hidden = HIDDEN_PTR + b * hidden_b + hk * hidden_h
    s = _logits(q, K + (b * (n_heads // group) + hk) * key_rows * D, keys, places, n_live, n_valid, capacity, size, hidden,
                scale, softcap, D, D_PAD, SOFTCAP, HIDDEN, PRECISION)  # fmt: skip
    p = tl.exp2(s - norm[:, None])
    inside = keys < size
    tl.store(COLUMNS + bh.to(tl.int64) * size + keys, tl.sum(p, 0), mask=inside)
    # Keys of the cache take columns [0, capacity + ROWS - 1), new ones those after them.
    width = size + 2 * (ROWS - 1)
    to = (ROWS - 1 - rows)[:, None] + (keys + tl.where(keys >= capacity, ROWS - 1, 0))[None, :]
    moved = MOVED + (bh.to(tl.int64) * ROWS + rows[:, None]) * width + to
    tl.store(moved, p.to(MOVED.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["capacity", "t"])
def _add_diagonals(MOVED, SUMS, capacity, t, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One program: BLOCK sums of columns of what `_weigh` has written down."""
    bh = tl.program_id(1).to(tl.int64)
    width = capacity + t + 2 * (ROWS - 1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    newer = at >= capacity + ROWS - 1
    column = tl.where(newer, at - (capacity + ROWS - 1), at)
    most = tl.where(newer, t, capacity)
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(0, ROWS):
        key = column - (ROWS - 1 - row)
        there = (at < width) & (key >= 0) & (key < most)
        total += tl.load(MOVED + (bh * ROWS + row) * width + at, mask=there, other=0.0).to(tl.float32)
    tl.store(SUMS + bh * width + at, total, mask=at < width)


def slots_before(keys: Tensor, tokens: int) -> int:
    """How many slots keys (B, Hkv, R, D) begin with, a multiple of `KEY_BLOCK`: fewer rows than that come after the new
    tokens."""
    return (keys.shape[2] - tokens) // KEY_BLOCK * KEY_BLOCK


def last_sums(q: Tensor, keys: Tensor, lens: Tensor, at: At, logits: Logits) -> Sums:
    """`sparse_index.last_sums` of at least `LAST_QUERIES` new tokens, in fp32. keys (B, Hkv, R, D), contiguous: C
    slots, then the new tokens (`slots_before`). Weights are rounded to fp16 before they are added by diagonal, for
    tensors in 16 bits."""
    (b, h, t, d), (hkv, key_rows), hidden = q.shape, keys.shape[1:3], logits.hidden
    capacity = slots_before(keys, t)
    size = capacity + t
    assert t >= LAST_QUERIES and keys.is_contiguous()
    exact = q.dtype == torch.float32
    width = size + 2 * (LAST_QUERIES - 1)
    parts = torch.empty(b * h, SPLITS, 2, LAST_QUERIES, dtype=torch.float32, device=q.device)
    columns = torch.empty(b, h, size, dtype=torch.float32, device=q.device)
    moved = torch.empty(b * h, LAST_QUERIES, width, dtype=torch.float32 if exact else torch.float16, device=q.device)
    sums = torch.empty(b, h, width, dtype=torch.float32, device=q.device)
    block = 32 if exact else 128
    per_split = triton.cdiv(size, SPLITS * block) * block
    strides = (*q.stride()[:3], *lens.stride(), *((0, 0) if hidden is None else hidden.stride()[:2]))
    unused = lens
    given = (q, keys, lens, at.valid, unused if hidden is None else hidden)
    options = {
        "D": d, "D_PAD": max(16, triton.next_power_of_2(d)), "BLOCK": block, "PARTS_OF_HEAD": SPLITS, "ROWS": LAST_QUERIES,
        "SOFTCAP": bool(logits.softcap), "HIDDEN": hidden is not None, "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 4,
    }  # fmt: skip
    how = (float(logits.scale), float(logits.softcap))
    with torch.cuda.device_of(q):
        _sum_parts[(SPLITS, b * h)](*given, parts, *how, *strides, h, h // hkv, t, size, key_rows, per_split, **options)
        _weigh[(triton.cdiv(size, block), b * h)](
            *given, unused if logits.sinks is None else logits.sinks, parts, columns, moved, *how, *strides, h, h // hkv,
            t, size, key_rows, SINKS=logits.sinks is not None, **options,
        )  # fmt: skip
        _add_diagonals[(triton.cdiv(width, 512), b * h)](
            moved, sums, capacity, t, BLOCK=512, ROWS=LAST_QUERIES, num_warps=4
        )
    cut = capacity + LAST_QUERIES - 1
    return Sums(columns, sums[..., :cut], sums[..., cut:])
