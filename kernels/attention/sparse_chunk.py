"""Attention of a chunk on what `VisibleBlocks` says: a kernel that reads visible blocks and single keys only.

The keys of the cache and the new ones lie in one tensor. Per head and block of queries, `_list_blocks` makes a list of
the visible blocks: first those that every query sees as a whole, which need no mask, and from the end those that are
partly dead or lie on the diagonal. `_sparse_chunk` goes through the first, then the others, then the single keys, of
which it leaves out those whose block it has seen.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kvrewrite.kernels.attention.chunk import heads_together
from kvrewrite.kernels.attention.patterns import KEY_BLOCK, QUERY_BLOCK
from kvrewrite.kernels.attention.sparse_index import Sums, find_visible
from kvrewrite.kernels.attention.sparse_sums import last_sums, slots_before
from kvrewrite.kernels.groups import At, Dense, Logits, Pages, Slots, Tokens, VisibleBlocks
from kvrewrite.kernels.rotary.gather import gather


class SparseConfig(NamedTuple):
    """Tile of the kernel: query rows, a part of `QUERY_BLOCK`; keys, a part of `KEY_BLOCK`; warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def sparse_config(dtype: torch.dtype, d: int, dv: int) -> SparseConfig:
    """The tile for a dtype and head dims. Frozen: edit it after measuring."""
    wide = max(d, dv)
    if dtype == torch.float32:  # no tensor cores: what does not spill is small
        return SparseConfig(32, 32, 8, 1) if wide <= 128 else SparseConfig(16, 16, 4, 1)
    if wide <= 128:
        return SparseConfig(128, 64, 8, 3)
    return SparseConfig(128, 64, 8, 2) if wide <= 256 else SparseConfig(64, 32, 8, 2)


@triton.jit(do_not_specialize=["lens_b", "lens_h", "group", "n_heads", "n_q", "n_k", "n_old", "n_columns"])
def _list_blocks(
    BLOCKS, COLUMNS, LENS, LIST, COUNTS, lens_b, lens_h, group, n_heads, n_q, n_k, n_old, n_columns,
    QB: tl.constexpr, KB: tl.constexpr, HIDDEN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: the list of a block of queries of one head, and how many whole blocks, other blocks and single keys
    it has. n_old: blocks of the cache, of n_k."""
    pid = tl.program_id(0)
    qb, bh = pid % n_q, pid // n_q
    b, h = bh // n_heads, bh % n_heads
    live = tl.load(LENS + b.to(tl.int64) * lens_b + (h // group) * lens_h)
    base = pid.to(tl.int64) * n_k
    whole_count = 0
    other_count = 0
    for start in tl.range(0, n_k, STEP):
        at = start + tl.arange(0, STEP)
        seen = tl.load(BLOCKS + base + at, mask=at < n_k, other=0).to(tl.int32) != 0
        whole = tl.where(at < n_old, (at + 1) * KB <= live, (at - n_old + 1) * KB <= qb * QB)
        if HIDDEN:
            whole = whole & (at < n_old)
        first = (seen & whole).to(tl.int32)
        second = (seen & (whole == 0)).to(tl.int32)
        to = whole_count + tl.cumsum(first, 0) - first
        tl.store(LIST + base + to, at, mask=first != 0)
        to = other_count + tl.cumsum(second, 0) - second
        tl.store(LIST + base + (n_k - 1 - to), at, mask=second != 0)
        whole_count += tl.sum(first, 0)
        other_count += tl.sum(second, 0)
    column_count = 0
    for start in tl.range(0, n_columns, STEP):
        at = start + tl.arange(0, STEP)
        key = tl.load(COLUMNS + bh.to(tl.int64) * n_columns + at, mask=at < n_columns, other=-1)
        column_count += tl.sum(((key >= 0) & (key < n_old * KB + (qb + 1) * QB)).to(tl.int32), 0)
    tl.store(COUNTS + pid * 3, whole_count)
    tl.store(COUNTS + pid * 3 + 1, other_count)
    tl.store(COUNTS + pid * 3 + 2, column_count)


@triton.jit
def _rows_of(base, keys, real, N: tl.constexpr, PAD: tl.constexpr, MASK: tl.constexpr):
    """Rows `keys` of N channels; zeros in padded channels and, with MASK, in rows that are not real."""
    cols = tl.arange(0, PAD)
    # Offsets of whole rows in 64 bits, as in chunk.py.
    at = base + keys[:, None].to(tl.int64) * N + cols[None, :]
    if MASK:
        return tl.load(at, mask=real[:, None] & (cols < N)[None, :], other=0.0)
    elif PAD > N:
        return tl.load(at, mask=(cols < N)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _sparse_keys(
    acc, m_i, l_i, q, K, V, LIST, SEEN, count, rows, n_live, n_valid, capacity, HIDDEN_PTR, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    KB: tl.constexpr, SIGN: tl.constexpr, MASK: tl.constexpr, COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
    HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over `count` blocks of LIST, which runs forward or (SIGN = -1) back, or over `count` single
    keys of it (COLUMNS). Without MASK every row sees every key. Logits and m_i are in powers of 2."""
    PARTS: tl.constexpr = KB // BLOCK_N
    if SOFTCAP:
        factor = 1.0
    else:
        factor = scale * 1.4426950408889634
    if COLUMNS:
        tiles = tl.cdiv(count, BLOCK_N)
    else:
        tiles = count * PARTS
    for i in tl.range(0, tiles):
        if COLUMNS:
            place = i * BLOCK_N + tl.arange(0, BLOCK_N)
            keys = tl.load(LIST + place, mask=place < count, other=0)
            real = tl.load(SEEN + keys // KB, mask=place < count, other=1).to(tl.int32) == 0
        else:
            keys = tl.load(LIST + SIGN * (i // PARTS)) * KB + (i % PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
            real = keys >= 0
        new = keys - capacity
        if MASK:
            real = real & tl.where(new < 0, keys < n_live, new < n_valid)
        s = tl.dot(q, tl.trans(_rows_of(K, keys, real, D, D_PAD, MASK)), input_precision=PRECISION)
        if SOFTCAP:  # as in chunk.py
            x = s * (scale / softcap)
            tanh = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
            if PRECISION == "ieee":
                square = x * x
                series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.05396825)))
                tanh = tl.where(square < 0.04, series, tanh)
            s = (softcap * 1.4426950408889634) * tanh
        if MASK:
            seen = real[None, :] & (new[None, :] <= rows[:, None])
            if HIDDEN:
                shut = tl.load(HIDDEN_PTR + new, mask=real & (new >= 0), other=0).to(tl.int32)
                seen = seen & ((shut == 0)[None, :] | (new[None, :] == rows[:, None]))
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        if MASK:  # a row may have seen nothing so far
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            shift = m_new
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        v = _rows_of(V, keys, real, DV, DV_PAD, MASK)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


# Lengths that change from call to call compile once.
@triton.jit(
    do_not_specialize=["lens_b", "lens_h", "t", "n_k", "n_columns", "batch_heads", "heads_at_once", "n_m", "n_q"]
)
def _sparse_chunk(
    Q, K, V, LIST, SEEN, COLUMNS, COUNTS, LENS, VALID, SINK, HIDDEN_PTR, OUT, LSE, scale, softcap,
    q_b, q_h, q_t, lens_b, lens_h, hidden_b, hidden_h, n_heads, group, t, capacity, key_rows, n_k, n_columns, batch_heads,
    heads_at_once, n_m, n_q,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, PRECISION: tl.constexpr, SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head. Order of programs as in chunk_hopper.py. key_rows: how many rows a
    head has in K and V."""
    pid = tl.program_id(0)
    first_head = pid // (n_m * heads_at_once) * heads_at_once
    rest = pid % (n_m * heads_at_once)
    together = tl.minimum(heads_at_once, batch_heads - first_head)
    bh = first_head + rest % together
    m0 = (n_m - 1 - rest // together) * BLOCK_M
    b = (bh // n_heads).to(tl.int64)
    h = bh % n_heads
    hk = (h // group).to(tl.int64)
    n_kv = n_heads // group

    in_tile = tl.arange(0, BLOCK_M)
    rows = m0 + in_tile
    inside = rows < t
    channels = tl.arange(0, D_PAD)
    q_tile = Q + b * q_b + h.to(tl.int64) * q_h + m0.to(tl.int64) * q_t + in_tile[:, None] * q_t
    q = tl.load(q_tile + channels[None, :], mask=inside[:, None] & (channels < D)[None, :], other=0.0)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)

    # Rows from n_valid on get 0 and -inf; a program that has no others looks at no keys.
    n_valid = tl.minimum(tl.load(VALID + b), t)
    active = (m0 < n_valid).to(tl.int32)
    n_live = tl.load(LENS + b * lens_b + hk * lens_h)
    block = bh.to(tl.int64) * n_q + m0 // QB
    whole = tl.load(COUNTS + block * 3) * active
    other = tl.load(COUNTS + block * 3 + 1) * active
    columns = tl.load(COUNTS + block * 3 + 2) * active
    head = (b * n_kv + hk) * key_rows
    keys = K + head * D
    values = V + head * DV
    blocks = LIST + block * n_k
    seen = SEEN + block * n_k
    hidden = HIDDEN_PTR + b * hidden_b + hk * hidden_h
    acc, m_i, l_i = _sparse_keys(
        acc, m_i, l_i, q, keys, values, blocks, seen, whole, rows, n_live, n_valid, capacity, hidden, scale, softcap,
        D, DV, D_PAD, DV_PAD, BLOCK_N, KB, 1, False, False, SOFTCAP, HIDDEN, PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = _sparse_keys(
        acc, m_i, l_i, q, keys, values, blocks + (n_k - 1), seen, other, rows, n_live, n_valid, capacity, hidden, scale,
        softcap, D, DV, D_PAD, DV_PAD, BLOCK_N, KB, -1, True, False, SOFTCAP, HIDDEN, PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = _sparse_keys(
        acc, m_i, l_i, q, keys, values, COLUMNS + bh.to(tl.int64) * n_columns, seen, columns, rows, n_live, n_valid,
        capacity, hidden, scale, softcap,
        D, DV, D_PAD, DV_PAD, BLOCK_N, KB, 1, True, True, SOFTCAP, HIDDEN, PRECISION,
    )  # fmt: skip

    if SINKS:
        sink = tl.load(SINK + h).to(tl.float32) * 1.4426950408889634
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        acc = acc * alpha[:, None]
        m_i = m_new
    valid = (rows < n_valid) & (l_i > 0.0)
    inverse = 1.0 / tl.where(valid, l_i, 1.0)
    lse = tl.where(valid, (m_i + tl.log2(tl.where(valid, l_i, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + bh.to(tl.int64) * t + rows, lse, mask=inside)
    out_tile = OUT + (b * t + m0) * n_heads * DV + h * DV + in_tile[:, None] * (n_heads * DV)
    e = tl.arange(0, DV_PAD)
    out = tl.where(valid[:, None], acc * inverse[:, None], 0.0).to(OUT.dtype.element_ty)
    tl.store(out_tile + e[None, :], out, mask=inside[:, None] & (e < DV)[None, :])


def together(cached: Tensor, new: Tensor) -> Tensor:
    """Slots, up to a multiple of `KEY_BLOCK`, and new tokens in one tensor: (B, Hkv, C + T, D), contiguous."""
    return torch.cat([pad(cached, (0, 0, 0, -cached.shape[2] % KEY_BLOCK)), new], 2)


def gathered_together(cache: Pages, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a cache on pages, keys and values, with rows to spare after the new tokens."""
    width, page = cache.table.shape[2], cache.k_pages.shape[1]
    table = pad(
        cache.table, (0, triton.cdiv(k.shape[2], page))
    )  # whatever these pages are: `gather` reads live slots only
    keys, values = gather(cache.k_pages, cache.v_pages, table, cache.lens)
    assert keys is not None and values is not None
    for whole, new in ((keys, k), (values, v)):
        whole[:, :, width * page : width * page + k.shape[2]] = new
    return keys, values


def attend_visible(
    q: Tensor, keys: Tensor, values: Tensor, visible: VisibleBlocks, lens: Tensor, at: At, logits: Logits
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens on what they see of keys (B, Hkv, R, D) and values (B, Hkv, R, Dv), both contiguous: C
    slots, of which lens (B, Hkv) int32 are live, then the new tokens, then what is never read. C is a multiple of
    `KEY_BLOCK`.

    Returns what `chunk_attention` returns. What is dead or padding may be anything."""
    (blocks, columns), hidden = visible, logits.hidden
    assert blocks is not None and columns is not None
    (b, h, t, d), (_, hkv, key_rows, dv) = q.shape, values.shape
    n_q, n_k = blocks.shape[2:]
    capacity = slots_before(keys, t)
    if n_k != (capacity + t + KEY_BLOCK - 1) // KEY_BLOCK or n_q != triton.cdiv(t, QUERY_BLOCK):
        raise ValueError(f"got {n_q} x {n_k} blocks for {t} queries, {capacity} slots and {t} new tokens")
    if q.stride(3) != 1 or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            f"q has strides {q.stride()}, keys {keys.stride()} and values {values.stride()}; expected channels side by side, "
            "and contiguous keys and values"
        )
    seen, columns = blocks.contiguous().view(torch.uint8), columns.contiguous()
    listed = torch.empty(b, h, n_q, n_k, dtype=torch.int32, device=q.device)
    counts = torch.empty(b, h, n_q, 3, dtype=torch.int32, device=q.device)
    out = torch.empty(b, t, h, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    config = sparse_config(q.dtype, d, dv)
    at_once = heads_together(b * h, h // hkv, capacity + t, (d + dv) * q.element_size())
    n_m = triton.cdiv(t, config.block_m)
    with torch.cuda.device_of(q):
        _list_blocks[(b * h * n_q,)](
            seen, columns, lens, listed, counts, *lens.stride(), h // hkv, h, n_q, n_k, capacity // KEY_BLOCK,
            columns.shape[2], QB=QUERY_BLOCK, KB=KEY_BLOCK, HIDDEN=hidden is not None,
            STEP=1024, num_warps=4,
        )  # fmt: skip
        _sparse_chunk[(n_m * b * h,)](
            q, keys, values, listed, seen, columns, counts, lens, at.valid, lens if logits.sinks is None else logits.sinks,
            lens if hidden is None else hidden, out, lse, float(logits.scale), float(logits.softcap),
            *q.stride()[:3], *lens.stride(), *((0, 0) if hidden is None else hidden.stride()[:2]),
            h, h // hkv, t, capacity, key_rows, n_k, columns.shape[2], b * h, min(at_once, b * h), n_m, n_q,
            D=d, DV=dv, D_PAD=max(16, triton.next_power_of_2(d)), DV_PAD=max(16, triton.next_power_of_2(dv)),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, QB=QUERY_BLOCK, KB=KEY_BLOCK,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", SINKS=logits.sinks is not None,
            SOFTCAP=bool(logits.softcap), HIDDEN=hidden is not None, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def sparse_attention(
    patterns: str, tokens: Tokens, dense: Dense, cache: Pages, at: At, logits: Logits
) -> tuple[Tensor, Tensor]:
    """`cached_attention` of what the patterns leave of it, for chunks of more than `DENSE_TOKENS` tokens."""
    q, k, v = tokens
    if dense.k_dense is None and dense.v_dense is None and cache.k_pages.shape[1] % KEY_BLOCK == 0:
        keys, values = gathered_together(cache, k, v)
    else:
        slots = gather(
            None if dense.k_dense is not None else cache.k_pages, None if dense.v_dense is not None else cache.v_pages,
            cache.table, cache.lens,
        )  # fmt: skip
        parts = [given if given is not None else read for given, read in zip(dense, slots, strict=True)]
        keys, values = (together(part, new) for part, new in zip(parts, (k, v), strict=True) if part is not None)

    def sums(*_: Any) -> Sums:
        return last_sums(q, keys, cache.lens, at, logits)

    capacity = slots_before(keys, q.shape[2])
    seen = Slots(keys[:, :, :capacity], values[:, :, :capacity], cache.lens)
    visible = find_visible(patterns, tokens, seen, at, logits, sums)
    return attend_visible(q, keys, values, visible, cache.lens, at, logits)
