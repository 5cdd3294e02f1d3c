"""RoPE of a chunk's queries and keys in one launch, for channels whose partners are half a head away."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # that a program rotates: each finds cos and sin in registers


@triton.jit
def _turn(x, out, x_h, x_t, heads, tokens, first, t, c1, c2, s1, s2, d, mask, D: tl.constexpr, HEADS: tl.constexpr):
    """Up to HEADS heads from `first` on of a tile of tokens. x: those of a row; out: likewise, (T, heads, D)."""
    for head in range(first, tl.minimum(first + HEADS, heads)):
        h = t * 0 + head  # int64
        came = x + h[:, None] * x_h + t[:, None] * x_t + d[None, :]
        low = tl.load(came, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(came + D // 2, mask=mask, other=0.0).to(tl.float32)
        to = out + (t * heads + h)[:, None] * D + d[None, :]
        tl.store(to, (low * c1 - high * s1).to(out.dtype.element_ty), mask=mask)
        tl.store(to + D // 2, (high * c2 + low * s2).to(out.dtype.element_ty), mask=mask)


# Lengths that change from call to call compile once.
@triton.jit(do_not_specialize=["tokens"])
def _turn_both(
    q, q_b, q_h, q_t, q_out, q_heads, k, k_b, k_h, k_t, k_out, k_heads, cos, c_b, c_t, sin, s_b, s_t, tokens,
    D: tl.constexpr, HALF_PAD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of HEADS heads: of queries first, then of keys."""
    b = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, HALF_PAD)
    mask = (t < tokens)[:, None] & (d < D // 2)[None, :]
    cos += b * c_b + t[:, None] * c_t + d[None, :]
    sin += b * s_b + t[:, None] * s_t + d[None, :]
    c1 = tl.load(cos, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos + D // 2, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin + D // 2, mask=mask, other=0.0).to(tl.float32)
    groups = (q_heads + HEADS - 1) // HEADS
    if group < groups:
        out = q_out + b * tokens * q_heads * D
        _turn(q + b * q_b, out, q_h, q_t, q_heads, tokens, group * HEADS, t, c1, c2, s1, s2, d, mask, D, HEADS)
    else:
        out = k_out + b * tokens * k_heads * D
        first = (group - groups) * HEADS
        _turn(k + b * k_b, out, k_h, k_t, k_heads, tokens, first, t, c1, c2, s1, s2, d, mask, D, HEADS)


def turn_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + [-x2, x1] * sin of the halves x1, x2 of queries (B, H, T, D) and keys (B, Hkv, T, D), each contiguous
    in its last dimension; cos, sin: (B or 1, T, D), likewise. Computed in fp32 and rounded once. Returns tensors of the
    same shapes that in memory are (B, T, heads, D)."""
    b, h, t, d = q.shape
    for name, x, shape in (("k", k, (b, k.shape[1], t, d)), ("cos", cos, (t, d)), ("sin", sin, (t, d))):
        if tuple(x.shape[-len(shape) :]) != shape or (x.dim() == 3 and x.shape[0] not in (1, b)):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape} for q of shape {tuple(q.shape)}")
    if d % 2 or any(x.stride(-1) != 1 for x in (q, k, cos, sin)):
        raise ValueError(f"head dimensions must be even and the last dimensions contiguous, got {d} channels")
    q_out, k_out = [torch.empty(b, t, x.shape[1], d, dtype=x.dtype, device=x.device) for x in (q, k)]
    if b and t:
        half = triton.next_power_of_2(d // 2)
        rows = max(1, 2048 // half) if t > 64 else 8
        groups = triton.cdiv(h, HEADS) + triton.cdiv(k.shape[1], HEADS)
        along = [(0 if x.shape[0] == 1 else x.stride(0), x.stride(1)) for x in (cos, sin)]
        _turn_both[(triton.cdiv(t, rows), groups, b)](
            q, *q.stride()[:3], q_out, h, k, *k.stride()[:3], k_out, k.shape[1], cos, *along[0], sin, *along[1], t,
            D=d, HALF_PAD=half, ROWS=rows, HEADS=HEADS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
