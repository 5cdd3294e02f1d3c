"""Finds where a tensor was projected: the ops that multiply by a weight, and the last of them before a node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import ancestors

aten = torch.ops.aten

WEIGHT_OPS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.embedding.default,
    aten._grouped_mm.default,
    aten.convolution.default,
    aten.conv1d.default,
    aten.baddbmm.default,
)
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.to.dtype)


def is_weight_op(node: fx.Node) -> bool:
    """Whether `node` multiplies by a weight: a projection begins there."""
    if node.op == "call_function" and node.target is aten.matmul.default:
        return _is_weight(node.args[1])
    return node.op == "placeholder" or (node.op == "call_function" and node.target in WEIGHT_OPS)


def _is_weight(node: Any) -> bool:
    """Whether `node` is a parameter, possibly transposed (x @ weight.T)."""
    while isinstance(node, fx.Node) and node.target in TRANSPOSES:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def projections(node: fx.Node) -> list[fx.Node]:
    """Returns the weight ops' outputs that `node` is made from, in graph order; does not look past these."""
    region = ancestors([node], stop=is_weight_op)
    return sorted(n for n in region if is_weight_op(n) and n.op == "call_function")
