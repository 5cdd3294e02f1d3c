"""What layers that are no attention carry from token to token: their last inputs, or a matrix that decays.

Rows are left-aligned: of T new tokens the first valid[b] of row b are real, and what comes after them changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # tokens that one step of the scan takes, where a head decays as a whole
CHANNEL_CHUNK = 16  # the same where every channel decays by itself, which takes that many times the channels as scores


def with_past(x: Tensor, past: Tensor, valid: Tensor, dim: int) -> Tensor:
    """[past, x] along `dim`; `past` becomes, in place, the last inputs of each row.

    x: (B, ...) with T tokens along dim; past: the same with a fixed number n of tokens; valid: (B,) int.
    """
    count = past.shape[dim]
    whole = torch.cat([past, x], dim)
    shape = [1] * x.dim()
    shape[0], shape[dim] = x.shape[0], count
    index = (valid.long()[:, None] + torch.arange(count, device=x.device)).reshape(shape)
    past.copy_(whole.gather(dim, index.expand_as(past)))
    return whole


def decayed_sum(
    decay: Tensor, x: Tensor, state: Tensor, dim: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = decay_t * h_{t-1} + x_t, entry by entry. Returns all h, and the last one.

    decay, x: (B, ...) with T tokens along `dim`; state: the same without that dim, h before the first token; in its
    dtype.
    """
    a, h = decay.to(state.dtype).movedim(dim, 1), x.to(state.dtype).movedim(dim, 1)
    if valid is not None:
        real = torch.arange(h.shape[1], device=x.device) < valid[:, None]
        real = real.reshape(*real.shape, *[1] * (h.dim() - 2))
        a, h = torch.where(real, a, 1), torch.where(real, h, 0)
    reach = 1  # tokens that each entry has summed
    while reach < h.shape[1]:
        h = torch.cat([h[:, :reach], a[:, reach:] * h[:, :-reach] + h[:, reach:]], 1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], 1)
        reach *= 2
    h = h + a * state[:, None]
    return h.movedim(1, dim), h[:, -1]


def linear_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence of linear attention and state-space layers, over T tokens. Returns the outputs and the last state.

    Token by token, with S (N, P) the state of a head: S = exp(decay) S; u = v, or with beta the delta rule's beta (v -
    S^T k); S = S + k u^T; output = S^T q. In chunks, as in the chunked forms of Mamba-2 (arXiv 2405.21060) and of gated
    delta networks (arXiv 2412.06464).

    q, k: (B, T, H, N); v: (B, T, H, P); decay: the logarithm, at most 0, (B, T, H) or by channel (B, T, H, N); beta:
    (B, T, H); state: (B, H, N, P). Outputs (B, T, H, P) and state are in `state`'s dtype.
    """
    by_channel = decay.dim() == 4
    if valid is not None:
        real = (torch.arange(q.shape[1], device=q.device) < valid[:, None])[:, :, None]
        decay = torch.where(real[..., None] if by_channel else real, decay, 0)
        k = torch.where(real[..., None], k, 0)
    q, k, v, decay = (x.to(state.dtype).transpose(1, 2) for x in (q, k, v, decay))
    rates = None if beta is None else beta.to(state.dtype).transpose(1, 2)[..., None]
    outputs = []
    step = CHANNEL_CHUNK if by_channel else CHUNK
    for start in range(0, q.shape[2], step):
        at = slice(start, start + step)
        out, state = _chunk(
            q[:, :, at], k[:, :, at], v[:, :, at], decay[:, :, at], None if rates is None else rates[:, :, at], state
        )
        outputs.append(out)
    return torch.cat(outputs, 2).transpose(1, 2), state


def _chunk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of L tokens, all (B, H, L, ...)."""
    since = decay.cumsum(2)  # what has decayed since the chunk's beginning, this token's own included
    length = since.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if since.dim() == 4:
        between = since[:, :, :, None] - since[:, :, None]
        between = between.masked_fill(later[:, :, None], float("-inf")).exp()
        scores = torch.einsum("bhin,bhjn,bhijn->bhij", q, k, between)
    else:
        between = (since[..., None] - since[:, :, None]).masked_fill(later, float("-inf")).exp()
        scores = (q @ k.transpose(2, 3)) * between
        since = since[..., None]
    fresh = v
    if beta is not None:
        # Each token takes off what the state has under its key already: a triangular system within the chunk.
        own = (
            torch.einsum("bhin,bhjn,bhijn->bhij", k, k, between)
            if between.dim() == 5
            else k @ k.transpose(2, 3) * between
        )
        system = (beta * own).tril(-1)
        given = beta * (v - (k * since.exp()) @ state)
        fresh = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    out = (q * since.exp()) @ state + scores @ fresh
    last = since[:, :, -1:]
    state = last.exp().transpose(2, 3) * state + (k * (last - since).exp()).transpose(2, 3) @ fresh
    return out, state
