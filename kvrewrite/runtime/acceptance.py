"""Which drafted tokens stay: those that the model itself would have chosen, on the device, without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """accepted: how many drafted tokens stay, () int64; token: what comes after them, (1,) int64."""

    accepted: Tensor
    token: Tensor


def greedy(drafted: Tensor, logits: Tensor) -> Verdict:
    """Drafted tokens (k,) stay as long as they are the likeliest of the model's logits (k + 1, vocabulary)."""
    best = logits.argmax(-1)
    accepted = (best[:-1] == drafted).long().cumprod(0).sum()
    return Verdict(accepted, best[accepted[None]])


def sampled(drafted: Tensor, q: Tensor | None, logits: Tensor) -> Verdict:
    """The rule of speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): what comes out is distributed as
    softmax(logits), whatever was drafted.

    drafted: (k,), drawn from q (k, vocabulary), probabilities in fp32; None: certain, as what is looked up. logits: the
    model's (k + 1, vocabulary). A token stays with probability min(1, p / q); in the place of the first that does not,
    one is drawn from what p has more than q.
    """
    p = logits.float().softmax(-1)
    k, at = len(drafted), drafted[:, None]
    if q is None:
        q = torch.zeros_like(p[:k]).scatter_(1, at, 1.0)
    chance = torch.rand(k, 1, device=p.device)
    stays = chance * q.gather(1, at) < p[:k].gather(1, at)
    accepted = stays[:, 0].long().cumprod(0).sum()
    # Where p has nothing more than q, rounding alone has rejected the token.
    rest = (p[:k] - q).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:k])
    weights = torch.cat([rest, p[k:]])[accepted[None]]
    return Verdict(accepted, torch.multinomial(weights, 1)[:, 0])
