"""Token merging in plain torch: what an eviction drops is folded into the most similar slot that stays (D2O).

Source: D2O (arXiv 2406.13035), the authors' code AIoT-MLSys-Lab/D2O, class `D2O_LayerKVCache`. As there:

- every dropped token looks for the kept key of its head with the largest cosine similarity u, on keys as they are cached;
- the threshold is the mean of all u (heads and tokens) at the first eviction and 0.5 * threshold + 0.5 * mean at each later
  one, renewed before it is compared; a layer and row has one threshold;
- the i-th dropped token of every head is judged together: merged in all heads if the mean of their u reaches the threshold;
- a kept slot that n tokens go to becomes (kept + sum of u_i * dropped_i) / (1 + n), keys and values alike: similarities
  weigh the dropped tokens, the kept one weighs 1, and the divisor counts tokens. The weights of one slot do not add up to
  1; a slot that tokens less similar than 1 go to gets shorter.

The paper's formula for the weights could not be compared with that code. Ours: one threshold per row, where the code
has one a batch (of one row); per kv head, where the code repeats the kv heads before caching; heads may drop unequal
numbers, then the mean is over the heads that have an i-th token; tokens are counted, and ties between equally similar
slots decided, by position in the text, so slot order is free; a key of length 0 or with NaN has no similarity and is
left alone.

Similarities are computed in fp64 and rounded to fp32 before anything is decided, sums are in fp64: batching, padding
and the device do not change the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 128 << 20
DECAY = 0.5  # alpha and beta of the code's command line


def merge(
    k: Tensor, v: Tensor, kept: Tensor, victims: Tensor, pos: Tensor, threshold: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Folds the victims into the kept slots; returns new (k, v, threshold).

    k: (B, Hkv, N, D); v: (B, Hkv, N, Dv); kept, victims: (B, Hkv, N) bool, disjoint; what is in neither is dead and may
    hold anything; pos: (B, Hkv, N) position in the text; threshold: (B,) fp32, NaN before the row's first eviction.
    Only kept slots change, and only those that a victim goes to. Rows without victims keep everything, their threshold
    too. most: no head has more victims (ValueError on the CPU if one has); without it the device is asked, which waits
    for it.
    """
    if most is None or not k.is_cuda:  # a device can't be asked without waiting for it
        found = int(victims.sum(-1).max()) if victims.numel() else 0
        if most is not None and found > most:
            raise ValueError(f"a head drops {found} slots, and at most {most} were announced")
        most = found
    most = min(most, victims.shape[-1])
    if most == 0:
        return k, v, threshold
    by_position = torch.where(victims, pos.long(), torch.iinfo(torch.int64).max)
    order = torch.argsort(by_position, dim=-1, stable=True)[..., :most]
    exists = torch.gather(victims, -1, order)
    similarity, target = _nearest(k, kept, pos, order, exists)
    judged = torch.isfinite(similarity)
    mean, any_judged = _mean(similarity, judged, (1, 2))
    renewed = torch.where(torch.isnan(threshold), mean, (1 - DECAY) * threshold + DECAY * mean)
    threshold = torch.where(any_judged, renewed, threshold)
    together, _ = _mean(similarity, judged, (1,))
    merged = judged & (together >= threshold[:, None])[:, None]
    weight = torch.where(merged, similarity, 0).double()
    count = torch.zeros(pos.shape, dtype=torch.float64, device=k.device).scatter_add_(-1, target, merged.double())
    return _fold(k, order, target, weight, count), _fold(v, order, target, weight, count), threshold


def _take(x: Tensor, slots: Tensor) -> Tensor:
    """x (B, Hkv, N, D) at slots (B, Hkv, M): (B, Hkv, M, D)."""
    return torch.gather(x, 2, slots[..., None].expand(*slots.shape, x.shape[-1]))


def _nearest(k: Tensor, kept: Tensor, pos: Tensor, order: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """For each dropped token the largest cosine similarity (B, Hkv, M) fp32 to a kept key (-inf: none), and its
    slot."""
    # What is not a kept key, and a key that has no direction, is NaN, and so is every cosine with it.
    unit = torch.where(kept[..., None], k, 0).double()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    places = pos.long()
    best, where = [], []
    step = max(1, BLOCK_BYTES // max(1, kept.numel() * 24))  # fp64 cosines, their fp32 copy, positions
    for lo in range(0, order.shape[-1], step):
        slots = order[..., lo : lo + step]
        mine = torch.where(exists[..., lo : lo + step, None], _take(k, slots), 0).double()
        mine = mine / mine.norm(dim=-1, keepdim=True)
        cosine = torch.einsum("bhmd,bhnd->bhmn", mine, unit).float()
        cosine = cosine.masked_fill(torch.isnan(cosine), float("-inf"))
        top = cosine.amax(-1)
        # Of equally similar slots the one that is earliest in the text.
        tied = torch.where(cosine == top[..., None], places[:, :, None], torch.iinfo(torch.int64).max)
        best.append(top)
        where.append(tied.argmin(-1))
    return torch.cat(best, dim=-1), torch.cat(where, dim=-1)


def _mean(x: Tensor, counted: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean of x over dims where counted, in fp32, and whether there is anything to count."""
    n = counted.sum(dims)
    return (torch.where(counted, x, 0).double().sum(dims) / n.clamp(min=1)).float(), n > 0


def _fold(x: Tensor, order: Tensor, target: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """(x + weighted sum of the dropped) / (1 + count) at the targets; everything else as it was."""
    dropped = torch.where(weight[..., None] != 0, _take(x, order), 0).double() * weight[..., None]
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    total.scatter_add_(2, target[..., None].expand(dropped.shape), dropped)
    hit = count[..., None] > 0
    return torch.where(hit, ((x.double() + total) / (1 + count[..., None])).to(x.dtype), x)
