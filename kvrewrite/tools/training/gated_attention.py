"""Causal attention with a gate per key, and its gradients, without a (T, T) tensor in memory.

A gate m_j multiplies the weight of key j after the exponential, for every query but the key's own:

    w_ij = m_j exp(l_ij) for j < i,  w_ii = exp(l_ii),  o_i = sum_j w_ij v_j / Z_i,  Z_i = sum_j w_ij [+ exp(sink)]

so m_j = 0 is exactly a key that the inference graph hides. The gradient of m_j also exists where m_j is 0, because a
straight-through estimator learns from it: d o_i / d m_j = exp(l_ij) (v_j - o_i) / Z_i. An additive bias log m_j, which
FlexAttention could learn, has no gradient there. Forward and backward passes go through blocks of query rows; the
backward pass recomputes their weights from the rows' log-sum-exp (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvrewrite.kernels.groups import Logits, Tokens
from kvrewrite.ops.attention import ALL_VISIBLE
from kvrewrite.ops.groups import define

BLOCK_BYTES = 128 << 20  # logits of one block of query rows
BLOCK_BYTES_CPU = 8 << 20  # a block that fits a CPU's cache is faster
MAX_EXPONENT = 60.0  # a hidden key may outweigh all others; the largest exponent that keeps fp32 finite


@dataclass
class _Shape:
    """The arguments of attention besides its tensors."""

    scale: float
    softcap: float
    window: int
    chunk: int

    def first(self, row: int) -> int:
        """Returns the first key that any row from `row` on can see."""
        if self.window:
            return max(0, row - self.window + 1)
        return row // self.chunk * self.chunk if self.chunk else 0


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b for (N, I, J) and (N, J, K), in fp32 (fp64): 16-bit inputs on a GPU are multiplied as they are."""
    if a.dtype == b.dtype and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.to(_dtype(a)), b.to(_dtype(b)))


def _blocks(q: Tensor, shape: _Shape) -> list[tuple[int, int, int]]:
    """Returns (first key, first row, end) of blocks of query rows whose logits fit in BLOCK_BYTES."""
    b, h, t, _ = q.shape
    limit = BLOCK_BYTES if q.is_cuda else BLOCK_BYTES_CPU
    blocks, lo = [], 0
    while lo < t:
        first = shape.first(lo)
        hi = min(t, lo + max(1, limit // (4 * b * h * (t - first))))
        blocks.append((first, lo, hi))
        lo = hi
    return blocks


@dataclass
class _Block:
    """Logits of query rows [lo, hi) on keys [first, hi), as (B * Hkv, G * rows, keys)."""

    logits: Tensor  # capped, with alibi, -inf where a row sees nothing
    slope: Tensor | None  # d capped / d uncapped
    gate: Tensor  # m, 1 on the diagonal
    own: Tensor  # (1, G * rows, keys) bool: the diagonal


def _block(
    q: Tensor, k: Tensor, gate: Tensor, alibi: Tensor | None, shape: _Shape, first: int, lo: int, hi: int
) -> _Block:
    b, h, _, d = q.shape
    hkv = k.shape[1]
    group, rows, keys = h // hkv, hi - lo, hi - first
    rows_of_q = q[:, :, lo:hi].reshape(b * hkv, group * rows, d)
    logits = _mm(rows_of_q, k[:, :, first:hi].reshape(b * hkv, keys, d).transpose(1, 2)).mul_(shape.scale)
    slope = None
    if shape.softcap:
        capped = torch.tanh(logits / shape.softcap)
        slope = 1 - capped * capped
        logits = capped * shape.softcap
    row = torch.arange(lo, hi, device=q.device).repeat(group)[:, None]
    key = torch.arange(first, hi, device=q.device)
    hidden = key > row
    if shape.window:
        hidden |= row - key >= shape.window
    if shape.chunk:
        hidden |= row // shape.chunk != key // shape.chunk
    if alibi is not None:
        slopes = alibi.to(logits.dtype).view(1, hkv, group, 1, 1)
        distance = (row - key).to(logits.dtype).view(1, 1, group, rows, keys)
        logits = (logits.view(b, hkv, group, rows, keys) - slopes * distance).reshape(logits.shape)
    own = (key == row)[None]
    weight = gate[:, :, first:hi].reshape(b * hkv, 1, keys).to(logits.dtype)
    return _Block(logits.masked_fill(hidden, float("-inf")), slope, torch.where(own, 1.0, weight), own)


# ------------------------------------------------------------------------------------------------------------- forward
gated_attention_op = define(
    "gated_attention", Tokens, "Tensor gate", ALL_VISIBLE, "bool flip", returns="(Tensor, Tensor)"
)


@gated_attention_op
def gated(tokens: Tokens, gate: Tensor, logits: Logits, flip: bool) -> tuple[Tensor, Tensor]:
    """Computes causal attention of a whole sequence on itself with a gate per key; arguments as for
    `kvrewrite::attention`.

    q: (B, H, T, D); k: (B, Hkv, T, D); v: (B, Hkv, T, Dv); gate: (B, Hkv, T) fp32, the weight of key j for all queries
    but its own. Returns out (B, H, T, Dv) in q's dtype and the log-sum-exp (B, H, T) fp32 (fp64 for fp64), which is not
    differentiable. Differentiable in q, k, v, gate and sinks.

    flip: the gate's gradient is that of a flag raised alone: exp(l_ij) / (Z_i + (1 - m_j) exp(l_ij)) replaces exp(l_ij)
    / Z_i. It is the same where m_j is 1, and where m_j is 0 it is exactly the effect of bringing the key back. Without
    it the factor is the derivative, which can be as large as exp(60) for a hidden key that outweighs the others.
    """
    (q, k, v), sinks, alibi = tokens, logits.sinks, logits.alibi
    shape = _Shape(logits.scale, logits.softcap, logits.window, logits.chunk)
    b, h, t, _ = q.shape
    hkv = k.shape[1]
    dtype, group = _dtype(q), h // hkv
    out = torch.empty(b, t, h, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(b, h, t, dtype=dtype, device=q.device)
    for first, lo, hi in _blocks(q, shape):
        block = _block(q, k, gate, alibi, shape, first, lo, hi)
        kept = block.logits.masked_fill(block.gate == 0, float("-inf"))
        highest = kept.amax(dim=-1, keepdim=True)
        sink = None if sinks is None else _per_row(sinks, b, hkv, hi - lo).to(dtype)
        if sink is not None:
            highest = torch.maximum(highest, sink)
        weights = torch.exp(kept - highest) * block.gate
        total = weights.sum(dim=-1, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink - highest)
        values = v[:, :, first:hi].reshape(b * hkv, hi - first, -1)
        result = _mm(weights.to(v.dtype), values) / total
        out[:, :, lo:hi] = result.view(b, h, hi - lo, -1).to(q.dtype)
        lse[:, :, lo:hi] = (highest + torch.log(total)).view(b, hkv, group, hi - lo).reshape(b, h, hi - lo)
    return out, lse


def _per_row(per_head: Tensor, b: int, hkv: int, rows: int) -> Tensor:
    """Returns (H,) as (B * Hkv, G * rows, 1)."""
    group = per_head.shape[0] // hkv
    return per_head.view(1, hkv, group, 1).expand(b, -1, -1, rows).reshape(b * hkv, group * rows, 1)


@gated_attention_op.fake
def _(tokens: Tokens, gate: Tensor, logits: Logits, flip: bool) -> tuple[Tensor, Tensor]:
    q, v = tokens.q, tokens.v
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=_dtype(q))


# ------------------------------------------------------------------------------------------------------------ backward
gated_attention_backward_op = define(
    "gated_attention_backward",
    "Tensor grad",
    Tokens,
    "Tensor gate",
    "Tensor out",
    "Tensor lse",
    ALL_VISIBLE,
    "bool flip",
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@gated_attention_backward_op
def gated_attention_backward(
    grad: Tensor, tokens: Tokens, gate: Tensor, out: Tensor, lse: Tensor, logits: Logits, flip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of q, k, v (in their dtypes), gate (fp32) and sinks (H,); grad: the output's."""
    (q, k, v), sinks, alibi = tokens, logits.sinks, logits.alibi
    shape = _Shape(logits.scale, logits.softcap, logits.window, logits.chunk)
    b, h, t, d = q.shape
    hkv, dv = k.shape[1], v.shape[3]
    dtype, group = _dtype(q), h // hkv
    grad_q = torch.empty(b, h, t, d, dtype=q.dtype, device=q.device)
    grad_k = torch.zeros(b * hkv, t, d, dtype=dtype, device=q.device)
    grad_v = torch.zeros(b * hkv, t, dv, dtype=dtype, device=q.device)
    grad_gate = torch.zeros(b * hkv, t, dtype=dtype, device=q.device)
    grad_sinks = torch.zeros(h, dtype=dtype, device=q.device)
    grad = grad.to(q.dtype)
    along = (grad.to(dtype) * out.to(dtype)).sum(dim=-1)  # (B, H, T): the part that all weights of a row share
    for first, lo, hi in _blocks(q, shape):
        rows, keys = hi - lo, hi - first
        block = _block(q, k, gate, alibi, shape, first, lo, hi)
        norm = lse[:, :, lo:hi].reshape(b * hkv, group * rows, 1)
        mean = along[:, :, lo:hi].reshape(b * hkv, group * rows, 1)
        incoming = grad[:, :, lo:hi].reshape(b * hkv, group * rows, dv)
        values = v[:, :, first:hi].reshape(b * hkv, keys, dv)
        ungated = torch.exp((block.logits - norm).clamp_(max=MAX_EXPONENT))
        change = _mm(incoming, values.transpose(1, 2)).sub_(mean)
        weights = ungated * block.gate
        factor = ungated / (1 + ungated * (1 - block.gate)) if flip else ungated
        grad_gate[:, first:hi] += (factor * change).masked_fill_(block.own, 0.0).sum(dim=1)
        grad_v[:, first:hi] += _mm(weights.to(q.dtype).transpose(1, 2), incoming)
        grad_logits = weights.mul_(change)
        if block.slope is not None:
            grad_logits = grad_logits * block.slope
        grad_logits = grad_logits.mul_(shape.scale).to(q.dtype)
        part = _mm(grad_logits, k[:, :, first:hi].reshape(b * hkv, keys, d))
        grad_q[:, :, lo:hi] = part.view(b, h, rows, d).to(q.dtype)
        grad_k[:, first:hi] += _mm(grad_logits.transpose(1, 2), q[:, :, lo:hi].reshape(b * hkv, group * rows, d))
        if sinks is not None:
            weight = torch.exp(_per_row(sinks, b, hkv, rows).to(dtype) - norm)
            grad_sinks -= (weight * mean).view(b, h, rows).sum(dim=(0, 2))
    return (
        grad_q,
        grad_k.view(k.shape).to(k.dtype),
        grad_v.view(v.shape).to(v.dtype),
        grad_gate.view(gate.shape).to(gate.dtype),
        grad_sinks if sinks is None else grad_sinks.to(sinks.dtype),
    )


@gated_attention_backward_op.fake
def _(
    grad: Tensor, tokens: Tokens, gate: Tensor, out: Tensor, lse: Tensor, logits: Logits, flip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (q, k, v), sinks = tokens, logits.sinks
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        gate.new_empty(gate.shape),
        q.new_empty(q.shape[1], dtype=_dtype(q) if sinks is None else sinks.dtype),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, gate, sinks, alibi, *rest = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, gate, out, lse, sinks, alibi)
    ctx.mark_non_differentiable(lse)
    ctx.rest = rest


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    # An unused gate gradient costs little beside the rest, so all gradients come from one op.
    found = torch.ops.kvrewrite.gated_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    grads = [g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:5], strict=True)]
    return (*grads, None, None, None, None, None, None)


gated_attention_op.gradient(_backward, _setup)
gated_attention = torch.ops.kvrewrite.gated_attention
