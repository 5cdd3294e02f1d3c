"""Which blocks of a memory new tokens ask for, and where on the device a block lies (InfLLM, arXiv 2402.04617)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.groups import Question
from kvrewrite.kernels.recall.streams import beside, to_host

NOTES = (
    4  # numbers of a row before the blocks: its first position, its tokens, and what the memory has before and after
)


def wide(x: Tensor) -> torch.dtype:
    """What sums of x are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def group_sums(q: Tensor, kv_heads: int) -> Tensor:
    """Queries (B, H, T, D) summed over the heads that share keys: (B, Hkv, T, D)."""
    b, h, t, d = q.shape
    return q.to(wide(q)).reshape(b, kv_heads, h // kv_heads, t, d).sum(2)


def look_up(asked: Question, marks: Tensor, choice: Tensor, first: int, block: int) -> Tensor:
    """The blocks with the largest relevance to each row's new tokens: the sum over these, over all heads and over the
    block's representatives of q . k; of equals the older one. Where a row does not look, those that it had.

    marks (B, S', Hkv, D): by block, the sum of its representatives' keys. choice (B, K): the blocks that each row has, plus
    one, 0 after the last; it is renewed. first: tokens before the first block; block: tokens of one. Returns (B, 4 + K) int64
    in host memory: position of the first new token, number of them, tokens in the memory before and after, and the blocks in
    the order of the text, -1 after the last. On a GPU it is filled in beside the current stream.
    """
    q, positions, valid, before, after, looks = asked
    with beside(q.device, *asked, marks, choice):
        real = torch.arange(q.shape[2], device=q.device) < valid[:, None]
        sums = group_sums(q, marks.shape[2])
        query = torch.where(real[:, None, :, None], sums, 0.0).sum(2)  # (B, Hkv, D)
        there = torch.arange(marks.shape[1], device=q.device) < ((before[:, None] - first) // block)
        relevance = torch.einsum("bhd,bnhd->bn", query, marks.to(query.dtype))
        relevance = torch.where(there, relevance, float("-inf"))
        most = min(choice.shape[1], marks.shape[1])
        best = torch.sort(relevance, dim=1, descending=True, stable=True).indices[:, :most]
        best = torch.where(torch.gather(there, 1, best), best, marks.shape[1]).sort(dim=1).values
        found = torch.zeros_like(choice)
        found[:, :most] = torch.where(best < marks.shape[1], best + 1, 0).to(choice.dtype)
        anew = (looks > 0) & (valid > 0)
        choice.copy_(torch.where(anew[:, None], found, choice))
        begin = positions[:, 0] if positions.shape[1] else torch.zeros_like(valid)
        numbers = torch.stack([x.long() for x in (begin, valid, before, after)], 1)
        return to_host(torch.cat([numbers, choice.long() - 1], 1))


def settle(use: Tensor, blocks: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Where `blocks` lie on the device: their places, and (place, block) of those that are still to be copied there.

    use (N, 2) int64: which block each of N places has, plus one, and when it was last asked for; it is renewed. What was
    asked for longest ago makes room.
    """
    held = {block - 1: place for place, (block, _) in enumerate(use.tolist()) if block}
    now = int(use[:, 1].max()) + 1
    stays = {held[block] for block in blocks if block in held}
    by_age = sorted((when, place) for place, (_, when) in enumerate(use.tolist()) if place not in stays)
    room = iter(place for _, place in by_age)
    copied = []
    for block in blocks:
        if block not in held:
            held[block] = next(room)
            copied.append((held[block], block))
    places = [held[block] for block in blocks]
    for place, block in zip(places, blocks):
        use[place, 0], use[place, 1] = block + 1, now
    return places, copied
