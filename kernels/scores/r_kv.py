"""R-KV's scores in plain torch (arXiv 2505.24133, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

SIMILAR = 0.5  # above this cosine a key says the same as another
AT_ONCE = 1 << 24  # cosines that are alive together


def recent_queries(q: Tensor, state: Tensor, valid: Tensor) -> Tensor:
    """The last W queries of each row, the new ones among them, oldest first: (B, H, W, D), as state.

    q: (B, H, T, D), of which the first valid (B,) count; state: (B, H, W, D), those before, renewed in place.
    """
    width = state.shape[2]
    joined = torch.cat([state, q.to(state.dtype)], dim=2)
    index = valid.long()[:, None] + torch.arange(width, device=q.device)
    found = torch.gather(joined, 2, index[:, None, :, None].expand_as(state))
    state.copy_(found)
    return found


def joint_scores(
    queries: Tensor, keys: Tensor, places: Tensor, scale: float, kernel: int, share: float, evicts: Tensor
) -> Tensor:
    """share * importance - (1 - share) * redundancy of every slot, (B, Hkv, N) fp32, 0 for the newest W and dead ones.

    queries: (B, H, W, D), the last of each row; keys: (B, Hkv, N, D); places: (B, Hkv, N) positions, -1 for
    dead slots; evicts: (B,), whether anything goes. Importance: the largest of `kernel` neighbours, by position, of the
    mean over queries of a softmax over slots before the newest W of the group's largest logit.
    Redundancy: softmax over slots of the mean cosine to all slots, in which each slot leaves out the newest one that
    is like it (cosine above 0.5).
    """
    if not evicts.is_cuda and not bool(evicts.any()):  # a device can't be asked without waiting for it
        return torch.zeros(places.shape, device=keys.device)
    n = keys.shape[2]
    width = queries.shape[2]
    order = torch.argsort(places, dim=-1)  # dead slots first
    place = torch.gather(places, -1, order)
    live = place >= 0
    wide = torch.gather(keys, 2, order[..., None].expand_as(keys)).float()
    wide = torch.where(live[..., None], wide, 0.0)
    before = live & (torch.arange(n, device=keys.device) < n - width)
    newest = place[..., -1:]
    asked = newest - torch.arange(width - 1, -1, -1, device=keys.device) >= 0  # (B, Hkv, W)
    importance = _importance(queries, wide, before, asked, scale, kernel)
    score = share * importance - (1 - share) * _redundancy(wide, live)
    score = torch.where(before, score, 0.0)
    return torch.zeros_like(score).scatter_(-1, order, score)


def _importance(queries: Tensor, keys: Tensor, before: Tensor, asked: Tensor, scale: float, kernel: int) -> Tensor:
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))
    logits = (grouped @ keys[:, :, None].mT * scale).amax(2)  # (B, Hkv, W, N)
    weights = torch.softmax(logits.masked_fill(~before[:, :, None], float("-inf")), dim=-1).nan_to_num(0.0)
    weights = torch.where(asked[..., None], weights, 0.0)
    mean = weights.sum(2) / asked.sum(2, keepdim=True).clamp(min=1)
    return torch.nn.functional.max_pool1d(mean, kernel, stride=1, padding=kernel // 2)


def _redundancy(keys: Tensor, live: Tensor) -> Tensor:
    b, hkv, n, _ = keys.shape
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    total = torch.zeros(b, hkv, n, device=keys.device)
    column = torch.arange(n, device=keys.device)
    step = max(1, AT_ONCE // (b * hkv * n))
    for at in range(0, n, step):
        likeness = unit[:, :, at : at + step] @ unit.mT
        own = column[at : at + step, None] == column
        likeness = likeness.masked_fill(own, 0.0)
        last = torch.where(likeness > SIMILAR, column, -1).amax(-1, keepdim=True)
        total += torch.where(column == last, 0.0, likeness).sum(2)
    count = live.sum(-1, keepdim=True).clamp(min=1)
    return torch.softmax((total / count).masked_fill(~live, float("-inf")), dim=-1).nan_to_num(0.0)
