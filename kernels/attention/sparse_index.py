"""Which blocks of keys and which single keys each head of a chunk sees: MInference's online step in plain torch.

Everything is counted in keys as the chunk sees them: the live slots of the cache in their order, then the new tokens. A
diagonal is a distance between a query and a key in that order. Where nothing was evicted, that is the paper's matrix.

Per head (arXiv 2407.02490, section 3.2 and appendix C; code microsoft/MInference):

- vertical_slash: the softmax of the chunk's last queries, summed by column and by diagonal; the largest of each;
- a_shape: blocks of the first keys, and diagonals up to the window;
- block_sparse: the largest products of mean queries and mean keys, per block of queries.

Diagonals are rounded up to blocks, columns are not. A query always sees the blocks of its own block of queries. Rows of
at most `DENSE_TOKENS` new tokens see everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvrewrite.kernels.attention.patterns import (
    DENSE_TOKENS,
    FORCED,
    KEY_BLOCK,
    LAST_QUERIES,
    QUERY_BLOCK,
    HeadTable,
    head_table,
    parse,
)
from kvrewrite.kernels.groups import At, Logits, Slots, Tokens, VisibleBlocks

AT_ONCE = 1 << 23  # indices in memory


class Sums(NamedTuple):
    """Softmax weights of the last n queries, summed. columns (B, H, C + T): per key. cached (B, H, C + n - 1) and new
    (B, H, T + n - 1): per diagonal; entry u has the key at u of the newest query, the one at u - 1 of the query before
    it, and so on."""

    columns: Tensor
    cached: Tensor
    new: Tensor


Summing = Callable[[Tokens, Slots, At, Logits], Sums]


class _Frame(NamedTuple):
    """Sizes of a chunk. lens (B, H) int64: live slots of each query head's cache; valid (B, 1) int64; blocks of keys
    start at starts (K,), counted from the first slot (cached) or from the first new token; queries (Q,): where blocks
    of queries start; cached (K,) bool."""

    lens: Tensor
    valid: Tensor
    capacity: int
    tokens: int
    starts: Tensor
    cached: Tensor
    queries: Tensor


def key_blocks(capacity: int, tokens: int) -> int:
    """How many blocks of keys there are: those of the cache, then those of the new tokens."""
    return -(-capacity // KEY_BLOCK) - (-tokens // KEY_BLOCK)


def _frame(tokens: Tokens, slots: Slots, at: At) -> _Frame:
    t, c, device = tokens.q.shape[2], slots.k_cache.shape[2], tokens.q.device
    group = tokens.q.shape[1] // tokens.k.shape[1]
    old = -(-c // KEY_BLOCK)
    numbers = torch.arange(key_blocks(c, t), device=device)
    cached = numbers < old
    starts = torch.where(cached, numbers, numbers - old) * KEY_BLOCK
    queries = torch.arange(0, t, QUERY_BLOCK, device=device)
    lens = slots.lens.long().repeat_interleave(group, 1)
    return _Frame(lens, at.valid.long()[:, None], c, t, starts, cached, queries)


def last_sums(tokens: Tokens, slots: Slots, at: At, logits: Logits) -> Sums:
    """`Sums` in torch, in fp32 (fp64 of fp64)."""
    (q, k, _), b, h = tokens, *tokens.q.shape[:2]
    hkv, t, c = k.shape[1], k.shape[2], slots.k_cache.shape[2]
    n, dtype = min(LAST_QUERIES, t), torch.promote_types(q.dtype, torch.float32)
    rows = at.valid.long()[:, None] - n + torch.arange(n, device=q.device)  # (B, n); negative: there is no such query
    picked = rows.clamp(min=0)[:, None, :, None].expand(b, h, n, q.shape[3])
    last = torch.gather(q, 2, picked).to(dtype).view(b, hkv, h // hkv * n, q.shape[3])
    found = torch.cat([last @ x.to(dtype).mT for x in (slots.k_cache, k)], 3).view(b, hkv, h // hkv, n, c + t)
    found = found * logits.scale
    if logits.softcap:
        found = logits.softcap * torch.tanh(found / logits.softcap)
    live = torch.arange(c, device=q.device) < slots.lens[..., None]
    seen = torch.cat([live[:, :, None].expand(b, hkv, n, c), _own(rows, t, hkv, logits.hidden)], 3)
    found = found.masked_fill(~(seen & (rows >= 0)[:, None, :, None])[:, :, None], float("-inf"))
    norm = torch.logsumexp(found, 4, keepdim=True)
    if logits.sinks is not None:
        norm = torch.logaddexp(norm, logits.sinks.to(dtype).view(1, hkv, h // hkv, 1, 1))
    weights = torch.exp(found - norm.masked_fill(norm.isinf(), 0.0)).view(b, h, n, c + t)
    return Sums(weights.sum(2), _diagonals(weights[..., :c]), _diagonals(weights[..., c:]))


def _own(rows: Tensor, tokens: int, heads: int, hidden: Tensor | None) -> Tensor:
    """Which new tokens the queries at rows (B, n) see: (B, heads, n, T)."""
    new = torch.arange(tokens, device=rows.device)
    seen = (new <= rows[..., None])[:, None].expand(-1, heads, -1, -1)
    return seen if hidden is None else seen & (~hidden[:, :, None] | (new == rows[..., None])[:, None])


def _diagonals(weights: Tensor) -> Tensor:
    """Sums of (B, H, n, L) along diagonals, (B, H, L + n - 1): row n - 1 - j is moved by j columns."""
    b, h, n, width = weights.shape
    wide = pad(weights.flip(2), (0, n)).view(b, h, n * (width + n))
    # Rows that are one shorter than they are written are each moved by one column more than the one before.
    return wide[..., : n * (width + n - 1)].reshape(b, h, n, width + n - 1).sum(2)


def find_visible(
    text: str, tokens: Tokens, slots: Slots, at: At, logits: Logits, sums: Summing = last_sums
) -> VisibleBlocks:
    """What each head sees of a chunk. text: a pattern per query head. sums: what adds up the last queries' weights.

    Dead slots and padded tokens may hold anything."""
    heads = len(parse(text))
    if heads != tokens.q.shape[1]:
        raise ValueError(f"patterns of {heads} heads for attention of {tokens.q.shape[1]}")
    frame, table = _frame(tokens, slots, at), head_table(text, tokens.q.device)
    distances = torch.arange(frame.capacity + frame.tokens, device=tokens.q.device)
    near = (distances < table.window[:, None]).expand(tokens.q.shape[0], -1, -1)
    columns = tokens.q.new_empty(*tokens.q.shape[:2], 0, dtype=torch.int32)
    if table.most[0]:
        found = sums(tokens, slots, at, logits)
        near = near | _largest_diagonals(found, frame, table)
        columns = _largest_columns(found.columns, frame, table)
    blocks = _of_diagonals(near, frame) | _of_first_keys(frame, table)
    if table.most[2]:
        chosen = _nearest_blocks(tokens, slots, at, frame, table)
        blocks = blocks.index_copy(1, table.block_heads, chosen | blocks.index_select(1, table.block_heads))
    own = ~frame.cached & (frame.starts + KEY_BLOCK > frame.queries[:, None])  # and not after the queries: below
    everything = table.dense | (frame.valid <= DENSE_TOKENS)
    return VisibleBlocks((blocks | own | everything[..., None, None]) & possible(frame), columns)


def computed_share(visible: VisibleBlocks, tokens: Tokens, slots: Slots, at: At) -> Tensor:
    """How many keys the queries of each head are multiplied with, as a part of what dense attention takes: (B, H). A
    block counts as a whole, a single key once for each block of queries that comes after it."""
    (blocks, columns), frame = visible, _frame(tokens, slots, at)
    assert blocks is not None and columns is not None
    new = -(-frame.capacity // KEY_BLOCK) * KEY_BLOCK
    ends = (frame.queries + new + QUERY_BLOCK).expand(*columns.shape[:2], -1).contiguous()
    ordered = columns.long().masked_fill(columns < 0, 1 << 40).contiguous()
    single = torch.searchsorted(ordered, ends)
    real = frame.queries < frame.valid[..., None]
    counted = (blocks.sum(3) * KEY_BLOCK + single) * real
    return counted.sum(2) / (possible(frame).sum((2, 3)) * KEY_BLOCK).clamp(min=1)


def possible(frame: _Frame) -> Tensor:
    """Blocks that hold a live key which some query of the block sees: (B, H, Q, K) bool."""
    lens, valid = frame.lens[:, :, None, None], frame.valid[:, :, None, None]
    last = frame.queries[:, None] + QUERY_BLOCK - 1
    return torch.where(frame.cached, frame.starts < lens, (frame.starts < valid) & (frame.starts <= last))


def _largest_diagonals(sums: Sums, frame: _Frame, table: HeadTable) -> Tensor:
    """The chosen distances of each vertical_slash head: (B, H, C + T) bool."""
    size = frame.capacity + frame.tokens
    distance = torch.arange(size, device=frame.lens.device)
    score: Tensor | float = 0.0
    for part, newest in ((sums.cached, frame.lens + frame.valid - 1), (sums.new, frame.valid - 1)):
        if part.shape[2]:
            at = newest[..., None] - distance
            inside = (at >= 0) & (at < part.shape[2])
            at = at.clamp(0, part.shape[2] - 1).expand(*part.shape[:2], size)
            score = score + torch.where(inside, torch.gather(part, 2, at), 0.0)
    assert isinstance(score, Tensor)
    exists = distance < (frame.lens + frame.valid)[..., None]
    score = torch.where(exists, _forced(score, distance), float("-inf"))
    best = torch.topk(score, min(table.most[1], size), 2)
    taken = (torch.arange(best.values.shape[2], device=score.device) < table.slash[:, None]) & (best.values >= 0)
    return torch.zeros_like(score, dtype=torch.bool).scatter(2, best.indices, taken)


def _largest_columns(sums: Tensor, frame: _Frame, table: HeadTable) -> Tensor:
    """The chosen keys of each vertical_slash head, (B, H, V) int32, ascending, -1 after the last."""
    size = frame.capacity + frame.tokens
    key = torch.arange(size, device=sums.device)
    lens, rank = frame.lens[..., None], key - frame.capacity
    exists = torch.where(rank < 0, key < lens, rank < frame.valid[..., None])
    score = torch.where(exists, _forced(sums, torch.where(rank < 0, key, rank + lens)), float("-inf"))
    best = torch.topk(score, min(table.most[0], size), 2)
    taken = (torch.arange(best.values.shape[2], device=sums.device) < table.vertical[:, None]) & (best.values >= 0)
    ordered = best.indices.masked_fill(~taken, size).sort(2).values
    return ordered.masked_fill(ordered == size, -1).int()


def _forced(score: Tensor, place: Tensor) -> Tensor:
    """The first places are chosen in any case, in order: a sum is at most `LAST_QUERIES`."""
    return torch.where(place < FORCED, LAST_QUERIES + FORCED - place, score)


def _of_diagonals(near: Tensor, frame: _Frame) -> Tensor:
    """Blocks that a chosen distance, (B, H, C + T) bool, runs through: (B, H, Q, K) bool."""
    b, h, size = near.shape
    up_to = pad(near.cumsum(2, dtype=torch.int32), (1, 0))
    lens, valid = frame.lens[..., None, None], frame.valid[..., None, None]
    before = torch.where(frame.cached, lens, 0)  # slots before the first new token, where distances to slots are meant
    last_key = torch.minimum(frame.starts + KEY_BLOCK, torch.where(frame.cached, lens, valid)) - 1
    last_query = torch.minimum(frame.queries + QUERY_BLOCK, frame.valid[..., None]) - 1
    found = []
    step = max(1, AT_ONCE // (b * h * len(frame.starts)))
    for i in range(0, len(frame.queries), step):  # so that the indices of a long whole prompt are never there at once
        begin = (before + frame.queries[i : i + step, None] - last_key).clamp(0, size)
        end = (before + last_query[..., i : i + step, None] - frame.starts + 1).clamp(0, size)
        counts = [torch.gather(up_to, 2, x.expand(b, h, -1, -1).reshape(b, h, -1)) for x in (begin, end)]
        found.append((counts[1] > counts[0]).view(b, h, -1, len(frame.starts)))
    return torch.cat(found, 2) if len(found) != 1 else found[0]


def _of_first_keys(frame: _Frame, table: HeadTable) -> Tensor:
    """Blocks with one of the first keys of an a_shape head: (B, H, 1, K) bool."""
    rank = frame.starts + torch.where(frame.cached, 0, frame.lens[..., None])
    return (rank < table.first[:, None])[:, :, None]


def _nearest_blocks(tokens: Tokens, slots: Slots, at: At, frame: _Frame, table: HeadTable) -> Tensor:
    """The blocks of the block_sparse heads: (B, those heads, Q, K) bool."""
    (q, k, _), dtype = tokens, torch.promote_types(tokens.q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    real = (torch.arange(frame.tokens, device=q.device) < at.valid[:, None])[:, None]
    live = torch.arange(frame.capacity, device=q.device) < slots.lens[..., None]
    queries = _means(q.index_select(1, table.block_heads), real, QUERY_BLOCK, dtype)
    keys = torch.cat([_means(slots.k_cache, live, KEY_BLOCK, dtype), _means(k, real, KEY_BLOCK, dtype)], 2)
    score = queries @ keys.index_select(1, table.block_heads // group).mT
    score = score.masked_fill(~possible(frame).index_select(1, table.block_heads), float("-inf"))
    best = torch.topk(score, min(table.most[2], score.shape[3]), 3)
    count = table.blocks.index_select(0, table.block_heads)[:, None, None]
    taken = (torch.arange(best.values.shape[3], device=q.device) < count) & ~best.values.isneginf()
    return torch.zeros_like(score, dtype=torch.bool).scatter(3, best.indices, taken)


def _means(x: Tensor, real: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Means of the real rows of each block of (B, heads, N, D): (B, heads, blocks, D)."""
    missing = -x.shape[2] % block
    real = pad(real.expand(x.shape[:3]), (0, missing)).unflatten(2, (-1, block))
    blocks = pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block))
    summed = blocks.masked_fill(~real[..., None], 0.0).to(dtype).sum(3)
    return summed / real.sum(3).clamp(min=1)[..., None]


def visible_keys(visible: VisibleBlocks, begin: int, end: int, capacity: int, tokens: int) -> Tensor:
    """Which keys the queries [begin, end) see: (B, H, end - begin, C + T) bool, but for what no query may see."""
    blocks, columns = visible
    assert blocks is not None and columns is not None
    device, size = blocks.device, capacity + tokens
    old = torch.arange(capacity, device=device) // KEY_BLOCK
    new = torch.arange(tokens, device=device) // KEY_BLOCK + -(-capacity // KEY_BLOCK)
    rows = torch.arange(begin, end, device=device) // QUERY_BLOCK
    single = torch.zeros(*blocks.shape[:2], size + 1, dtype=torch.bool, device=device)
    single.scatter_(2, torch.where(columns < 0, size, columns).long(), True)
    return blocks[:, :, rows][..., torch.cat([old, new])] | single[:, :, None, :size]
