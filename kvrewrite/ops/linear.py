"""The operators that the linear layers of a decode step are fused into (passes/lower/fuse_linears.py).

The reference is `torch.nn.functional.linear` layer by layer, and RMS norms as transformers has them: on the CPU the same bits
as the graph that was fused. The kernels (kernels/linear/small.py) serve up to KERNEL_TOKENS tokens; for more there is one
of gated_linear on Hopper (kernels/linear/gated_hopper.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import gelu, silu

from kvrewrite.ops.dispatch import fused

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
MAX_WEIGHTS = 4
# Up to how many tokens the kernels are worth it. In fp32 they have no tensor cores.
KERNEL_TOKENS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 2}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ b) as one product of all tokens: x (..., K), weight (N, K).

    torch's own makes a product for each row of x (B, 1, K) where the stride of the axis of size 1 is not K, as it is after
    attention: 23 times the time at 80 rows of 4096 channels on an H200.
    """
    return functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _fused(op: str, x: Tensor) -> bool:
    most = KERNEL_TOKENS.get(x.dtype, 0)
    fits = 0 < x.shape[:-1].numel() <= most
    return fused(op, x, None if fits or not most else f"no tokens, or more than {most}")


@torch.library.custom_op("kvrewrite::linears", mutates_args=())
def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """x W^T (+ b) for up to MAX_WEIGHTS weights that read the same x, in one launch.

    x: (..., K); weights: (N_i, K), contiguous; biases: (N_i,) or None each. Returns a list of (..., N_i).
    """
    if _fused("linears", x):
        from kvrewrite.kernels.linear.small import small_linear

        return small_linear(x, weights, biases)
    return [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


@linears.register_fake
def _(x, weights, biases):  # type: ignore[no-untyped-def]
    return [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights]


def chunk_kernel_suits(weight: Tensor, activation: str) -> bool:
    """Whether a kernel of this device computes gated_linear of many tokens by weights (N, K) like this one. Elsewhere Inductor
    makes more of two linears."""
    if not weight.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(weight.device)[0] != 9:
        return False
    plain = type(weight) in (Tensor, torch.nn.Parameter)  # not one that stands for several
    aligned = plain and not any(n % 8 for n in weight.shape) and weight.data_ptr() % 16 == 0  # as TMA reads
    return activation == "silu" and weight.dtype in (torch.bfloat16, torch.float16) and aligned


@torch.library.custom_op("kvrewrite::gated_linear", mutates_args=())
def gated_linear(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(x gate^T) * (x up^T): x (..., K), gate and up (N, K), contiguous; activation: one of ACTIVATIONS. Returns (..., N)."""
    if x.shape[:-1].numel() > KERNEL_TOKENS.get(x.dtype, 0) and chunk_kernel_suits(gate, activation):
        if fused("gated_linear of a chunk", x):
            from kvrewrite.kernels.linear.gated_hopper import launch

            return launch(x.reshape(-1, x.shape[-1]), gate, up).view(*x.shape[:-1], -1)
    elif _fused("gated_linear", x):
        from kvrewrite.kernels.linear.small import small_gated_linear

        return small_gated_linear(x, gate, up, activation)
    return ACTIVATIONS[activation](linear(x, gate)) * linear(x, up)


@gated_linear.register_fake
def _(x, gate, up, activation):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], gate.shape[0])


@torch.library.custom_op("kvrewrite::linear_add", mutates_args=())
def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + (x W^T + b), the linear rounded before it is added: x (..., K), weight (N, K), residual (..., N)."""
    if _fused("linear_add", x):
        from kvrewrite.kernels.linear.small import small_linear

        return small_linear(x, [weight], [bias], residual)[0]
    return residual + linear(x, weight, bias)


@linear_add.register_fake
def _(x, weight, bias, residual):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain * (x / sqrt(mean(x^2) + eps)) over the last axis: computed in fp32, rounded to x's dtype before the gain."""
    if x.numel() and fused("rms_norm", x):
        from kvrewrite.kernels.linear.small import Norm
        from kvrewrite.kernels.linear.small import rms_norm as kernel

        return kernel(x, Norm(gain, eps))
    wide = x.to(torch.float32)
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.library.custom_op("kvrewrite::norm_linears", mutates_args=())
def norm_linears(
    x: Tensor, gain: Tensor, eps: float, weights: list[Tensor], biases: list[Tensor | None]
) -> list[Tensor]:
    """`linears` of `rms_norm(x, gain, eps)`: x (..., K), gain (K,)."""
    if _fused("norm_linears", x):
        from kvrewrite.kernels.linear.small import Norm, small_linear

        return small_linear(x, weights, biases, norm=Norm(gain, eps))
    normed = rms_norm(x, gain, eps)
    return [linear(normed, w, b) for w, b in zip(weights, biases, strict=True)]


@norm_linears.register_fake
def _(x, gain, eps, weights, biases):  # type: ignore[no-untyped-def]
    return [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights]


@torch.library.custom_op("kvrewrite::norm_gated_linear", mutates_args=())
def norm_gated_linear(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`gated_linear` of `rms_norm(x, gain, eps)`: x (..., K), gain (K,)."""
    if _fused("norm_gated_linear", x):
        from kvrewrite.kernels.linear.small import Norm, small_gated_linear

        return small_gated_linear(x, gate, up, activation, norm=Norm(gain, eps))
    normed = rms_norm(x, gain, eps)
    return ACTIVATIONS[activation](linear(normed, gate)) * linear(normed, up)


@norm_gated_linear.register_fake
def _(x, gain, eps, gate, up, activation):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], gate.shape[0])
