"""A memory of blocks: attention to what was looked up, and what new tokens leave in it (InfLLM, arXiv 2402.04617).

On a GPU the memory lies in pinned host memory. Blocks are copied beside the current stream, while that computes the attention
to the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.groups import Attended, Entering, Logits, Memory, Placed, Recalling, Tokens
from kvrewrite.kernels.recall.lookup import NOTES, group_sums, settle, wide
from kvrewrite.kernels.recall.streams import beside, finish, join


def recall(attended: Attended, new: Entering, notes: Tensor, memory: Memory, how: Recalling, flash: bool) -> Tensor:
    """Attention to the cache and to the memory together, (B, H, T, Dv); then the new tokens enter the memory.

    notes (B, 4 + K): what `look_up` gave. A query sees the first tokens, once they have left the cache, and the blocks that
    its row has, all of them before it. flash: whether torch's flash attention computes that. Blocks that leave the cache
    with this step get their representatives.
    """
    device = attended.out.device
    finish(device)
    rows = notes.tolist()
    wanted = [[block for block in row[NOTES:] if block >= 0] for row in rows]
    with beside(device, memory.near_k, memory.near_v, after=False):
        places = [_bring(memory, row, blocks) for row, blocks in enumerate(wanted)]
    join(device)
    out = attended.out.clone()
    for row, (_, count, before, *_) in enumerate(rows):
        if count and before:
            _attend(row, places[row], attended, new.far_q, memory, how, flash, out)
    _remember(rows, new, memory)
    for row, (_, _, before, after, *_) in enumerate(rows):
        if after > before:
            _mark(row, before, after, memory, how)
    return out


def _bring(memory: Memory, row: int, blocks: list[int]) -> list[int]:
    """Copies the blocks of a row that are not on the device; where all of them lie there."""
    first, block = memory.first_k.shape[1], memory.near_k.shape[2]
    places, copied = settle(memory.near_use[row], blocks)
    for place, which in copied:
        begin = first + which * block
        for near, host in ((memory.near_k, memory.host_k), (memory.near_v, memory.host_v)):
            near[row, place].copy_(host[row, begin : begin + block], non_blocking=True)
    return places


def _attend(
    row: int,
    places: list[int],
    attended: Attended,
    far_q: Tensor,
    memory: Memory,
    how: Recalling,
    flash: bool,
    out: Tensor,
) -> None:
    """Writes a row's attention to the cache and to the memory to `out`."""
    index = torch.tensor(places, dtype=torch.int64, device=out.device)
    keys, values = (
        torch.cat([first[row], near[row, index].flatten(0, 1)]).transpose(0, 1)[None]  # (1, Hkv, n, D)
        for first, near in ((memory.first_k, memory.near_k), (memory.first_v, memory.near_v))
    )
    q = far_q[row : row + 1]
    found, lse = (_flash if flash else _plain)(Tokens(q, keys, values), how)
    near_lse = attended.lse[row]
    both = torch.logaddexp(near_lse, lse)
    parts = attended.out[row].to(wide(q)) * (near_lse - both).exp()[..., None]
    out[row] = (parts + found.to(wide(q)) * (lse - both).exp()[..., None]).to(out.dtype)


def _plain(tokens: Tokens, how: Recalling) -> tuple[Tensor, Tensor]:
    """Attention (H, T, Dv) of queries on keys that all of them see, and its log-sum-exp (H, T)."""
    q, k, _ = tokens
    at = q.new_zeros(1, q.shape[2], dtype=torch.int64)
    live = torch.ones(1, *k.shape[1:3], dtype=torch.bool, device=q.device)
    placed = Placed(at, torch.zeros_like(live, dtype=torch.int64), live)
    out, lse = reference.attend(tokens, placed, Logits(scale=how.scale, softcap=how.softcap))
    return out[0], lse[0]


def _flash(tokens: Tokens, how: Recalling) -> tuple[Tensor, Tensor]:
    """The same by torch's flash attention: the queries of a group are rows of one head."""
    q, k, v = tokens
    _, h, t, d = q.shape
    grouped = q.reshape(1, k.shape[1], h // k.shape[1] * t, d)
    found = torch.ops.aten._scaled_dot_product_flash_attention(grouped, k, v, 0.0, False, scale=how.scale)
    return found[0].reshape(h, t, v.shape[3]), found[1].reshape(h, t)


def _remember(rows: list[list[int]], new: Entering, memory: Memory) -> None:
    """New tokens enter: by their position in host memory, among the first tokens, and among the newest."""
    kv_heads, ring = new.k.shape[1], memory.latest.shape[1]
    keys, values = (x.transpose(1, 2).contiguous() for x in (new.far_k, new.v))  # (B, T, Hkv, D)
    with beside(keys.device, keys, values):
        for row, (begin, count, *_) in enumerate(rows):
            for host, x in ((memory.host_k, keys), (memory.host_v, values)):
                host[row, begin : begin + count].copy_(x[row, :count], non_blocking=True)
    kept = [group_sums(new.q, kv_heads), new.k, *[new.far_k] * (memory.latest.shape[2] - 2)]
    newest = torch.stack([x.transpose(1, 2).to(memory.latest.dtype) for x in kept], 2)  # (B, T, 2 or 3, Hkv, D)
    for row, (begin, count, *_) in enumerate(rows):
        for first, x in ((memory.first_k, keys), (memory.first_v, values)):
            there = max(0, min(count, first.shape[1] - begin))
            first[row, begin : begin + there] = x[row, :there]
        index = torch.arange(begin, begin + count, device=newest.device) % ring
        memory.latest[row, index] = newest[row, :count]


def _mark(row: int, before: int, after: int, memory: Memory, how: Recalling) -> None:
    """Chooses the representatives of a row's tokens from `before` to `after`, which leave the cache.

    A key's score is the mean of q . k over the `window` tokens after it, as attention sees both, summed over its group; of
    equals the older one counts. A block keeps the sum of its representatives.
    """
    first, block, ring = memory.first_k.shape[1], memory.near_k.shape[2], memory.latest.shape[1]
    before = max(before, first)
    count = after - before
    if count <= 0:
        return
    held = torch.arange(before, after + how.window, device=memory.latest.device) % ring
    newest = memory.latest[row, held]
    queries = newest[:, 0].to(wide(newest)).cumsum(0)
    sums = queries[how.window :] - queries[:count]  # of the `window` queries after each key
    scores = (newest[:count, 1].to(sums.dtype) * sums).sum(-1).view(-1, block, sums.shape[1])
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, : how.representatives]
    keys = newest[:count, -1].view(-1, block, *newest.shape[2:])
    chosen = torch.gather(keys, 1, best[..., None].expand(*best.shape, keys.shape[-1]))
    begin = (before - first) // block
    memory.marks[row, begin : begin + count // block] = chosen.to(sums.dtype).sum(1).to(memory.marks.dtype)
