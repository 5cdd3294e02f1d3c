"""Fuses RMS norms into the linear layers that read them, in a graph that runs single tokens.

Requires a graph after `fuse_linears`. Ensures the same values up to the order of sums and the rounding of what is
normalized (on the CPU the same bits), with

    linears(g * to(x32 * rsqrt(mean(x32 ** 2) + eps)), ...)   as   kvrewrite.norm_linears(x, g, eps, ...)

and kvrewrite.gated_linear as kvrewrite.norm_gated_linear, where x32 is x in fp32. So neither the norm nor what it makes
costs a launch. A norm that something else reads, too, stays, and so do norms of another form (a gain of 1 + g, a mean
taken off).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

import kvrewrite.ops  # noqa: F401  (registers the ops)
from kvrewrite.ir.fx import erase_dead, get_attr, is_op, named_args, op_args, tensor_of

aten = torch.ops.aten
ops = torch.ops.kvrewrite


class _Norm(NamedTuple):
    x: fx.Node
    gain: fx.Node
    eps: float


def fuse_norms(gm: fx.GraphModule) -> int:
    """Fuses in place; returns how many norms went into linears."""
    targets = {
        ops.linears.default: ops.norm_linears.default,
        ops.gated_linear.default: ops.norm_gated_linear.default,
    }
    fused = 0
    for node in list(gm.graph.nodes):
        if not is_op(node, *targets):
            continue
        args, target = named_args(node), targets[node.target]
        normed = args["x"]
        found = _norm(gm, normed) if isinstance(normed, fx.Node) and len(normed.users) == 1 else None
        if found is None:
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(target, op_args(target, **{**args, **found._asdict()}))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        fused += 1
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return fused


def _norm(gm: fx.GraphModule, node: fx.Node) -> _Norm | None:
    """The RMS norm that `node` is."""
    gain, normed = _split(node, aten.mul.Tensor, lambda n: n.op == "get_attr")
    if gain is None or normed is None:
        return None
    wide = _narrowed(normed)
    scale, x32 = _split(wide, aten.mul.Tensor, lambda n: is_op(n, aten.rsqrt.default)) if wide else (None, None)
    if scale is None or x32 is None:
        return None
    total: Any = scale.args[0]
    if not is_op(total, aten.add.Tensor) or total.kwargs or not isinstance(total.args[1], float):
        return None
    mean, eps = total.args
    if not is_op(mean, aten.mean.dim) or mean.args[1:] not in (([-1], True), ((-1,), True)) or mean.kwargs:
        return None
    squares = mean.args[0]
    if not is_op(squares, aten.pow.Tensor_Scalar) or tuple(squares.args) != (x32, 2):
        return None
    x = _widened(x32)
    weight, value = get_attr(gm, str(gain.target)), tensor_of(x)
    if x is None or value is None or weight.dim() != 1 or not weight.is_contiguous() or weight.dtype != value.dtype:
        return None
    return _Norm(x, gain, eps) if weight.shape[0] == value.shape[-1] else None  # type: ignore[arg-type]


def _split(node: Any, target: Any, which: Any) -> tuple[Any, Any]:
    """The operand of a product that `which` is true of, and the other one."""
    if is_op(node, target) and len(node.args) == 2 and not node.kwargs:
        for one, other in (node.args, node.args[::-1]):
            if isinstance(one, fx.Node) and isinstance(other, fx.Node) and which(one) and not which(other):
                return one, other
    return None, None


def _cast(node: fx.Node) -> torch.dtype | None:
    """The dtype that `node` casts to, if that is all it does."""
    if node.target == aten._to_copy.default and len(node.args) == 1 and set(node.kwargs) == {"dtype"}:
        return node.kwargs["dtype"]  # type: ignore[return-value]
    if node.target == aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return node.args[1]  # type: ignore[return-value]
    return None


def _widened(x32: fx.Node) -> fx.Node | None:
    """x, of which x32 is the fp32 form."""
    if _cast(x32) == torch.float32:
        return x32.args[0]  # type: ignore[return-value]
    value = tensor_of(x32)
    return x32 if value is not None and value.dtype == torch.float32 else None


def _narrowed(node: fx.Node) -> fx.Node | None:
    """The fp32 product that `node` is in the dtype of x."""
    if _cast(node) is not None:
        return node.args[0]  # type: ignore[return-value]
    value = tensor_of(node)
    return node if value is not None and value.dtype == torch.float32 else None
