"""What Compactor scores tokens by, in plain torch (arXiv 2507.08143): leverage scores and attention
within blocks."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-2  # on the diagonal of the Gram matrix, as the authors have it
AT_ONCE = 1 << 24  # logits that are alive together


def leverage(keys: Tensor, sketch: Tensor, valid: Tensor, first: int, last: int) -> Tensor:
    """Leverage scores of sketched keys: the diagonal of X (X^T X + ridge)^-1 X^T, (B, Hkv, T) fp32.

    keys: (B, Hkv, T, D) without their rotation; sketch: (Hkv, D, S); X: the keys less their mean,
    times the sketch, of the tokens from `first` on that are not among the `last` of a row's valid
    (B,) ones. Others have 0.
    """
    inside = _inside(keys.shape[2], valid, first, last)[:, None, :, None]
    sketched = (torch.where(inside, keys.to(sketch.dtype), 0.0) @ sketch).double()
    mean = sketched.sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)
    x = torch.where(inside, sketched - mean, 0.0)
    gram = x.mT @ x
    gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    factor, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.linalg.solve_triangular(factor, x.mT, upper=False)
    return solved.square().sum(-2).float()


def block_column_mass(q: Tensor, k: Tensor, valid: Tensor, block: int, first: int, last: int) -> Tensor:
    """Attention that keys receive within their block, from earlier and later queries alike: (B,
    Hkv, T) fp32.

    q: (B, H, T, D); k: (B, Hkv, T, D), both rotated. Blocks of `block` tokens begin at `first`; the
    `last` of a row's valid (B,) tokens take no part. The sum over a block's queries of softmax(q .
    k), which the authors do not scale, and the mean over a group's heads. Others have 0.
    """
    b, h, t, _ = q.shape
    hkv = k.shape[1]
    inside = _inside(t, valid, first, last)
    mass = torch.zeros(b, hkv, t, device=q.device)
    step = block * max(1, AT_ONCE // (b * h * block * block))  # whole blocks
    for at in range(first, t, step):
        rows = _blocks(q[:, :, at : at + step].float(), block).unflatten(1, (hkv, h // hkv))
        columns = _blocks(k[:, :, at : at + step].float(), block)[:, :, None]
        there = _blocks(inside[:, None, at : at + step, None], block)[:, :, None]  # (B, 1, 1, blocks, block, 1)
        logits = (rows @ columns.mT).masked_fill(~there.mT, float("-inf"))
        weights = torch.where(there & there.mT, torch.softmax(logits, dim=-1), 0.0)
        mass[:, :, at : at + step] = weights.sum(-2).mean(2).flatten(2)[..., : t - at]
    return mass


def _inside(length: int, valid: Tensor, first: int, last: int) -> Tensor:
    """(B, T): which tokens take part."""
    index = torch.arange(length, device=valid.device)
    return (index >= first) & (index < (valid - last)[:, None])


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, N, T, ...) as (B, N, blocks, block, ...), filled up with zeros."""
    more = -x.shape[2] % block
    return torch.nn.functional.pad(x, (0, 0, 0, more)).unflatten(2, (-1, block))
