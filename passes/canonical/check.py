"""Checks that the canonical graph can carry a cache: only attention sites and what `carry_state` understood mix tokens.

A model whose layers convolve, scan, shift or pool over the sequence in another way has state that nothing carries: it
would run, but chunks would give wrong results. Symbolic sizes show where the sequence is, so the check looks at what
ops do to that axis, not at the names of models.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import CaptureError, UnsupportedModelError
from kvrewrite.ir.fx import is_size, module_path, placeholder, shape_of, symbol, tensor_of
from kvrewrite.ir.site import AttentionSite

aten = torch.ops.aten
# Ops that reduce or scan one axis (second argument).
ALONG = {
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.max.dim,
    aten.min.dim,
    aten.flip.default,
    aten.roll.default,
    aten.sort.default,
    aten.var.correction,
    aten.std.correction,
    aten.prod.dim_int,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
}
WHOLE = {aten.sum.default, aten.mean.default, aten.max.default}
CONVOLUTIONS = {aten.convolution.default, aten.conv1d.default, aten.conv1d.padding, aten.unfold.default}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
PICKS = {aten.select.int, aten.slice.Tensor, aten.index_select.default}
SOURCES = {
    torch.ops.kvrewrite.attention.default,
    torch.ops.kvrewrite.linear_scan.default,
    torch.ops.kvrewrite.decayed_sum.default,
}
# In a node's meta: "" if its token mixing is accounted for, else the reason why it could not be.
CARRIED = "kvrewrite_carried"
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default}


def check(captured: Captured, sites: list[AttentionSite]) -> None:
    """Raises UnsupportedModelError that names the layer and the reason."""
    gm = captured.graph
    if not sites:
        raise UnsupportedModelError("no attention was found in the graph; nothing to rewrite")
    ids = placeholder(gm, "input_ids")
    if ids is None or symbol(shape_of(ids)[1]) != captured.length_symbol:
        # Without it the checks below would find no sequence and would pass.
        raise CaptureError(
            f"the length of the text, {captured.length_symbol}, became {ids and shape_of(ids)[1]} while the graph was looked at, "
            "so that can't be checked; please report the model"
        )
    data = data_nodes(gm)
    for node in gm.graph.nodes:
        if node in data and not is_size(node) and node.meta.get(CARRIED) != "":
            reason = mixes(node, captured.length_symbol)
            if reason:
                why = f" ({node.meta[CARRIED]})" if CARRIED in node.meta else ""
                raise UnsupportedModelError(
                    f"{_layer_of(node)}: {node.name} ({node.target}) {reason}, so the layer keeps state besides its keys and "
                    f"values that an evicted cache does not carry (recurrent, convolutional or linear attention){why}"
                )


def data_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """Returns the nodes whose values depend on the token ids."""
    found = {n for n in gm.graph.nodes if n.op == "placeholder" and n.target == "input_ids"}
    for node in gm.graph.nodes:
        if not is_size(node) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _layer_of(node: fx.Node) -> str:
    path = module_path(node)
    index = re.search(r"\.(\d+)(?:\.|$)", path)
    return f"layer {index.group(1)} ({path})" if index else f"module {path}" if path else "the model's own forward"


def sequence_axes(node: Any, length: Any) -> list[int]:
    """Returns the sequence axes of a tensor: of that size, or of a size that grows with it but not with the batch."""
    value = tensor_of(node)
    if value is None:
        return []
    return [i for i, s in enumerate(value.shape) if _is_length(symbol(s), length)]


def _is_length(expr: Any, length: Any) -> bool:
    """Whether a size is the length, or a sum or ceiling of it (padded, cut or chunked sequences)."""
    return hasattr(expr, "free_symbols") and expr.free_symbols == {length}


def mixes(node: fx.Node, length: Any) -> str | None:
    """The reason why `node` mixes tokens, or None if it does not."""
    if node.op != "call_function":
        return None
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    value = tensor_of(first) if first is not None else None
    axes = sequence_axes(first, length) if first is not None else []
    floating = value is not None and (value.is_floating_point() or value.is_complex())
    out = tensor_of(node)
    if node.target in SOURCES:
        return None
    if out is not None:
        if len(sequence_axes(node, length)) > 1:
            return "has two sequence axes"
        for axis in sequence_axes(node, length):
            expr = symbol(out.shape[axis])
            if expr != length and out.is_floating_point():
                return f"makes a sequence of {expr} instead of {length} tokens"
    if node.target in PADS and axes and value is not None and _pads(node, value.dim(), axes):
        return "shifts the sequence"
    if node.target in CONVOLUTIONS and axes:
        return "convolves over the sequence"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "loops"
    if node.target is aten.einsum.default and _einsum_sums(node, length):
        return "sums over the sequence"
    if value is None:
        return None
    if node.target in PICKS and floating and not sequence_axes(node, length):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if isinstance(dim, int) and dim % max(1, value.dim()) in axes:
            return "picks tokens of the sequence"
    if node.target in ALONG:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
            if isinstance(dim, int) and dim % max(1, value.dim()) in axes:
                return "reduces or scans the sequence"
    if node.target in WHOLE and floating and axes:
        return "reduces the sequence"
    if node.target in PRODUCTS:
        other = next((a for a in node.args[1:] if isinstance(a, fx.Node)), None)
        if value.dim() - 1 in axes and other is not None and len(sequence_axes(other, length)):
            return "sums over the sequence"
    return None


def _einsum_sums(node: fx.Node, length: Any) -> bool:
    """Whether a letter of an einsum that is summed over is a sequence axis."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    if "..." in equation:
        return any(sequence_axes(x, length) for x in operands) and not sequence_axes(node, length)
    inputs, _, result = equation.replace(" ", "").partition("->")
    summed = {
        letters[axis]
        for letters, x in zip(inputs.split(","), operands, strict=True)
        for axis in sequence_axes(x, length)
    } - set(result)
    return bool(summed)


def _pads(node: fx.Node, rank: int, axes: list[int]) -> bool:
    """Whether a padding (left, right of the last dim, of the one before, ...) adds to or cuts one of `axes`."""
    widths = node.args[1]
    assert isinstance(widths, (list, tuple))
    return any(rank - 1 - i // 2 in axes and width != 0 for i, width in enumerate(widths))
