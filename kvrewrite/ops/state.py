"""The operators of layers that carry a state besides keys and values: a window of inputs, or a linear recurrence.

`with_past`, `decayed_sum` and `linear_scan` are what canonical graphs have: they see a whole sequence, begin with
nothing, and gradients go through them. `cached_past`, `cached_sum` and `cached_scan` take their place once the state is
an input, and renew it in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.recurrence import reference
from kvrewrite.ops.attention import gradients
from kvrewrite.ops.dispatch import unversioned

_library = torch.library.Library("kvrewrite", "FRAGMENT")
_library.define("with_past(Tensor x, int count, int dim) -> Tensor")


def _with_past(x: Tensor, count: int, dim: int) -> Tensor:
    """x with `count` tokens of zeros before it, along `dim`."""
    shape = list(x.shape)
    shape[dim] = count
    return torch.cat([x.new_zeros(shape), x], dim)


_library.impl("with_past", _with_past, "CompositeImplicitAutograd")


@torch.library.custom_op("kvrewrite::decayed_sum", mutates_args=())
def decayed_sum(decay: Tensor, x: Tensor, dim: int) -> Tensor:
    """h_t = decay_t * h_{t-1} + x_t along `dim`, from zeros: as x. decay, x: (B, ...). Differentiable in both."""
    return _decayed_sum(decay, x, dim).contiguous()


def _decayed_sum(decay: Tensor, x: Tensor, dim: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return reference.decayed_sum(decay, x, x.new_zeros(x.select(dim, 0).shape, dtype=wide), dim)[0].to(x.dtype)


@decayed_sum.register_fake
def _(decay, x, dim):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _sum_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.dim = inputs
    ctx.save_for_backward(*tensors)


def _sum_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return (
        *gradients(lambda a, x: _decayed_sum(a, x, ctx.dim), ctx.saved_tensors, ctx.needs_input_grad[:2], grad),
        None,
    )


decayed_sum.register_autograd(_sum_backward, setup_context=_sum_setup)


@torch.library.custom_op("kvrewrite::linear_scan", mutates_args=())
def linear_scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> Tensor:
    """A linear recurrence over a whole sequence, from a state of zeros: (B, T, H, P) in v's dtype.

    q, k (B, T, H, N); v (B, T, H, P); decay (B, T, H) or (B, T, H, N); beta (B, T, H) or None: as
    `kernels/recurrence/reference.py` has them. Differentiable in all of them.
    """
    return _linear_scan(q, k, v, decay, beta).contiguous()


def _linear_scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    state = v.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=wide)
    return reference.linear_scan(q, k, v, decay, beta, state)[0].to(v.dtype)


@linear_scan.register_fake
def _(q, k, v, decay, beta):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


def _scan_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _scan_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return gradients(_linear_scan, ctx.saved_tensors, ctx.needs_input_grad, grad)


linear_scan.register_autograd(_scan_backward, setup_context=_scan_setup)


@torch.library.custom_op("kvrewrite::cached_past", mutates_args=("past",))
def cached_past(x: Tensor, past: Tensor, valid: Tensor, dim: int) -> Tensor:
    """[past, x] along `dim`, and `past` becomes the last inputs of each row.

    x: (B, ...) with T new tokens along `dim`, of which the first valid (B,) int32 of each row are real; past: the same
    with the last n tokens, zeros at first.
    """
    return reference.with_past(x, past, valid, dim)


@cached_past.register_fake
def _(x, past, valid, dim):  # type: ignore[no-untyped-def]
    shape = list(x.shape)
    shape[dim] = shape[dim] + past.shape[dim]
    return x.new_empty(shape)


@torch.library.custom_op("kvrewrite::cached_scan", mutates_args=("state",))
def cached_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor, valid: Tensor
) -> Tensor:
    """A linear recurrence that goes on from `state` (B, H, N, P), which is renewed: (B, T, H, P) in v's dtype.

    q, k (B, T, H, N); v (B, T, H, P); decay (B, T, H) or (B, T, H, N); beta (B, T, H) or None; valid (B,) int32: as
    `kernels/recurrence/reference.py` has them. The state is in fp32, fp64 where the model is.
    """
    out, last = reference.linear_scan(q, k, v, decay, beta, state, valid)
    state.copy_(last)
    return out.to(v.dtype).contiguous()


@cached_scan.register_fake
def _(q, k, v, decay, beta, state, valid):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


@torch.library.custom_op("kvrewrite::cached_sum", mutates_args=("state",))
def cached_sum(decay: Tensor, x: Tensor, state: Tensor, valid: Tensor, dim: int) -> Tensor:
    """h_t = decay_t * h_{t-1} + x_t along `dim`, going on from `state`, which becomes each row's last h: as x.

    decay, x (B, ...); state: the same without `dim`, in fp32, fp64 where the model is; valid (B,) int32.
    """
    out, last = reference.decayed_sum(decay, x, state, dim, valid)
    state.copy_(last)
    return out.to(x.dtype).contiguous()


@cached_sum.register_fake
def _(decay, x, state, valid, dim):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


unversioned("kvrewrite::cached_past", "kvrewrite::cached_scan", "kvrewrite::cached_sum")
