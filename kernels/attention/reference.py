"""Attention over bounded caches in plain torch: the oracle for every kernel, and the path on the CPU.

Everything is computed in fp32 (fp64 when the inputs are fp64), in blocks of query rows so that the scores of one block
stay within `BLOCK_BYTES` (`BLOCK_BYTES_CPU`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.attention.sparse_index import visible_keys
from kvrewrite.kernels.groups import Logits, Placed, Tokens, VisibleBlocks, Watch

BLOCK_BYTES = 128 << 20
BLOCK_BYTES_CPU = 16 << 20  # what malloc maps again each time costs more than the arithmetic


def _logits(q: Tensor, k: Tensor, placed: Placed, how: Logits) -> Tensor:
    """Masked logits (B, Hkv, G, T, N) of q (B, Hkv, G, T, D) against k (B, Hkv, N, D).

    A key is visible when it is live, not after the query, within the window or chunk by original position, and not
    hidden by a gate (a token always sees itself).
    """
    (q_pos, k_pos, live), (_, alibi, hidden, scale, softcap, window, chunk) = placed, how
    b, hkv, group, t, d = q.shape
    logits = (q.reshape(b, hkv, group * t, d) @ k.mT).view(b, hkv, group, t, k.shape[2]) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    distance = q_pos[:, None, :, None] - k_pos[:, :, None, :]  # (B, Hkv, T, N)
    seen = live[:, :, None, :] & (distance >= 0)
    if window:
        seen &= distance < window
    if chunk:
        seen &= (q_pos[:, None, :, None] // chunk) == (k_pos[:, :, None, :] // chunk)
    if hidden is not None:
        seen &= ~hidden[:, :, None, :] | (distance == 0)
    if alibi is not None:
        slopes = alibi.to(logits.dtype).view(1, q.shape[1], q.shape[2], 1, 1)
        logits = logits - slopes * distance[:, :, None].to(logits.dtype)
    return logits.masked_fill(~seen[:, :, None], float("-inf"))


def _blocks(q: Tensor, n_keys: int) -> list[tuple[int, int]]:
    """Ranges of query rows whose logits fit in BLOCK_BYTES."""
    rows, per_row = q.shape[2], max(1, q.shape[0] * q.shape[1] * n_keys * 4)
    limit = BLOCK_BYTES if q.is_cuda else BLOCK_BYTES_CPU
    step = max(1, min(rows, limit // per_row)) if rows else 1
    return [(i, min(rows, i + step)) for i in range(0, rows, step)]


def _math_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attend(
    tokens: Tokens, placed: Placed, how: Logits, own: bool = False, visible: VisibleBlocks | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries on keys that carry their own positions.

    q: (B, H, T, D); k: (B, Hkv, N, D); v: (B, Hkv, N, Dv); hidden: (B, Hkv, N). own: the last T keys are the queries'
    own tokens in order, so that a block of queries need not look at the keys after it. visible: with own, what they see
    of the keys (None: all). Returns out (B, H, T, Dv) in q's
    dtype and the natural log-sum-exp of each row (B, H, T) in fp32; a row that sees nothing gives 0 and -inf.
    """
    (q, k, v), (q_pos, k_pos, live) = tokens, placed
    b, h, t, d = q.shape
    hkv = k.shape[1]
    dtype = _math_dtype(q)
    grouped = q.reshape(b, hkv, h // hkv, t, d).to(dtype)
    kf = k.to(dtype)
    # A dead slot may hold anything (NaN too), and 0 * NaN is NaN.
    dead = ~live[..., None]
    vf = v.to(dtype).masked_fill(dead, 0.0)
    kf = kf.masked_fill(dead, 0.0)
    outs, lses = [], []
    for lo, hi in _blocks(q, k.shape[2]):
        end = k.shape[2] - t + hi if own else k.shape[2]
        part = Placed(q_pos[:, lo:hi], k_pos[:, :, :end], live[:, :, :end])
        seen = how if how.hidden is None else how._replace(hidden=how.hidden[:, :, :end])
        logits = _logits(grouped[:, :, :, lo:hi], kf[:, :, :end], part, seen)
        if visible is not None:
            keys = visible_keys(visible, lo, hi, k.shape[2] - t, t)[..., :end]
            logits = logits.masked_fill(~keys.view(logits.shape), float("-inf"))
        if how.sinks is not None:
            extra = how.sinks.to(dtype).view(1, hkv, h // hkv, 1, 1).expand(b, -1, -1, hi - lo, 1)
            lse = torch.logsumexp(torch.cat([logits, extra], dim=-1), dim=-1)
        else:
            lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - torch.where(torch.isinf(lse), 0.0, lse)[..., None])
        rows = weights.reshape(b, hkv, h // hkv * (hi - lo), end) @ vf[:, :, :end]
        outs.append(rows.view(b, hkv, h // hkv, hi - lo, v.shape[-1]))
        lses.append(lse)
    if not outs:
        return q.new_zeros(b, h, 0, v.shape[-1]), torch.zeros(b, h, 0, device=q.device)
    out = torch.cat(outs, dim=3).reshape(b, h, t, v.shape[-1])
    return out.to(q.dtype), torch.cat(lses, dim=3).reshape(b, h, t).float()


def column_mass(watch: Watch, placed: Placed, how: Logits) -> Tensor:
    """How much attention each key received: the column sums of the softmax matrix, rebuilt from the rows' LSE.

    k: (B, Hkv, N, D) all keys; rows of weight 0 are left out. Returns (B, Hkv, N) fp32, summed over the
    query heads of a group (NACL,
    arXiv 2408.03675, appendix A.7 (b); H2O's and SnapKV's scores are the same sum over other rows).
    """
    q, k, lse, rows, above, _ = watch
    live = placed.live
    b, h, t, d = q.shape
    hkv = k.shape[1]
    dtype = _math_dtype(q)
    grouped = q.reshape(b, hkv, h // hkv, t, d).to(dtype)
    kf = torch.where(live[..., None], k.to(dtype), 0.0)
    norm = lse.to(dtype).reshape(b, hkv, h // hkv, t)
    mass = torch.zeros(b, hkv, k.shape[2], dtype=dtype, device=q.device)
    for lo, hi in _blocks(q, k.shape[2]):
        logits = _logits(grouped[:, :, :, lo:hi], kf, placed._replace(q_pos=placed.q_pos[:, lo:hi]), how)
        row_lse = norm[:, :, :, lo:hi]
        weights = torch.exp(logits - torch.where(torch.isinf(row_lse), 0.0, row_lse)[..., None])
        if above is not None:
            weights = (weights > above[:, None, None, lo:hi, None]).to(dtype)
        weights = weights * rows[:, None, None, lo:hi, None].to(dtype)
        # A row beyond its valid length may be NaN; its weight is 0 and it must not count.
        mass += torch.where(rows[:, None, None, lo:hi, None] != 0, weights, 0.0).sum(dim=(2, 3))
    return mass.float()


def largest_weights(tokens: Tokens, placed: Placed, how: Logits, counts: Tensor) -> Tensor:
    """The largest softmax weight that each key got from any of the queries, and of any head of its group.

    tokens: q (B, H, T, D) and k (B, Hkv, N, D), no values; counts (B, T) bool: which queries count. Returns (B, Hkv, N)
    fp32, 0 where no query counts.
    """
    q, k, _ = tokens
    b, h, t, d = q.shape
    hkv = k.shape[1]
    dtype = _math_dtype(q)
    grouped = q.reshape(b, hkv, h // hkv, t, d).to(dtype)
    keys = torch.where(placed.live[..., None], k.to(dtype), 0.0)
    most = torch.zeros(b, hkv, k.shape[2], dtype=dtype, device=q.device)
    for lo, hi in _blocks(q, k.shape[2]):
        logits = _logits(grouped[:, :, :, lo:hi], keys, placed._replace(q_pos=placed.q_pos[:, lo:hi]), how)
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        if how.sinks is not None:
            lse = torch.logaddexp(lse, how.sinks.to(dtype).view(1, hkv, h // hkv, 1, 1))
        weights = torch.exp(logits - torch.where(torch.isinf(lse), 0.0, lse))
        weights = torch.where(counts[:, None, None, lo:hi, None], weights, 0.0)
        most = torch.maximum(most, weights.amax((2, 3)))
    return most.float()
