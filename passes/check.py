"""Checks that the canonical graph can carry a cache: nothing but the sites mixes tokens, and no layer lacks its site.

A model whose layers also convolve, scan, shift or pool over the sequence keeps state that an evicted cache does not
carry: it would run, and be wrong in chunks. Shapes say where the sequence is (symbolic sizes), so the check is by what ops
do to that axis, not by names of models.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import fx

from kvrewrite.capture import Captured
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.graph import is_size, module_path, symbol, tensor_of
from kvrewrite.site import AttentionSite

aten = torch.ops.aten
# Ops that reduce or scan one axis (second argument).
ALONG = {
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten.cumsum.default,
    aten.cumprod.default, aten.logcumsumexp.default, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default,
    aten.max.dim, aten.min.dim, aten.flip.default, aten.roll.default, aten.sort.default, aten.var.correction,
    aten.std.correction, aten.prod.dim_int, aten.logsumexp.default, aten.linalg_vector_norm.default,
}  # fmt: skip
WHOLE = {aten.sum.default, aten.mean.default, aten.max.default}
CONVOLUTIONS = {aten.convolution.default, aten.conv1d.default, aten.conv1d.padding, aten.unfold.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default}


def check(captured: Captured, sites: list[AttentionSite]) -> None:
    """Raises UnsupportedModelError that names the layer and the reason."""
    gm = captured.graph
    if not sites:
        raise UnsupportedModelError("no attention was found in the graph; nothing to rewrite")
    _check_layers(gm, sites)
    data = _data_nodes(gm)
    for node in gm.graph.nodes:
        if node in data and not is_size(node):
            reason = _mixes(node, captured.length_symbol)
            if reason:
                raise UnsupportedModelError(
                    f"{_layer_of(node)}: {node.name} ({node.target}) {reason}, so the layer keeps state besides its keys and "
                    "values that an evicted cache does not carry (recurrent, convolutional or linear attention)"
                )


def _data_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values depend on the token ids."""
    found = {n for n in gm.graph.nodes if n.op == "placeholder" and n.target == "input_ids"}
    for node in gm.graph.nodes:
        if not is_size(node) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _layer_of(node: fx.Node) -> str:
    path = module_path(node)
    index = re.search(r"\.(\d+)(?:\.|$)", path)
    return f"layer {index.group(1)} ({path})" if index else f"module {path or '?'}"


def _axes(node: Any, length: Any) -> list[int]:
    """Axes of a tensor that are the sequence: of that size, or of a size that grows with it without the batch."""
    value = tensor_of(node)
    if value is None:
        return []
    return [i for i, s in enumerate(value.shape) if _is_length(symbol(s), length)]


def _is_length(expr: Any, length: Any) -> bool:
    """Whether a size is the length, or a sum or ceiling of it (padded, cut or chunked sequences)."""
    return hasattr(expr, "free_symbols") and expr.free_symbols == {length}


def _mixes(node: fx.Node, length: Any) -> str | None:
    """Why `node` mixes tokens, or None."""
    if node.op != "call_function":
        return None
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    value = tensor_of(first) if first is not None else None
    axes = _axes(first, length) if first is not None else []
    floating = value is not None and (value.is_floating_point() or value.is_complex())
    out = tensor_of(node)
    if out is not None and node.target is not torch.ops.kvrewrite.attention.default:
        if len(_axes(node, length)) > 1:
            return "has two sequence axes"
        for axis in _axes(node, length):
            expr = symbol(out.shape[axis])
            if expr != length and out.is_floating_point():
                return f"makes a sequence of {expr} instead of {length} tokens"
    if node.target in CONVOLUTIONS and axes:
        return "convolves over the sequence"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "loops"
    if value is None:
        return None
    if node.target in ALONG:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
            if isinstance(dim, int) and dim % max(1, value.dim()) in axes:
                return "reduces or scans the sequence"
    if node.target in WHOLE and floating and axes:
        return "reduces the sequence"
    if node.target in PRODUCTS:
        other = next((a for a in node.args[1:] if isinstance(a, fx.Node)), None)
        if value.dim() - 1 in axes and other is not None and len(_axes(other, length)):
            return "sums over the sequence"
    return None


def _check_layers(gm: fx.GraphModule, sites: list[AttentionSite]) -> None:
    """Every layer of the repeated stack that holds sites must hold the same number of them."""
    pattern = re.compile(r"^(.*?\.)?(\d+)(?:\.|$)")
    per_stack: dict[str, Counter[int]] = {}
    for site in sites:
        match = pattern.match(site.module)
        if match:
            per_stack.setdefault(match.group(1) or "", Counter())[int(match.group(2))] += 1
    for stack, counts in per_stack.items():
        indices = set()
        for node in gm.graph.nodes:
            path = module_path(node)
            if node.op == "call_function" and path.startswith(stack):
                match = pattern.match(path)
                if match and (match.group(1) or "") == stack:
                    indices.add(int(match.group(2)))
        for index in sorted(indices):
            if counts[index] == 0:
                raise UnsupportedModelError(
                    f"layer {index} ({stack}{index}): no attention was found in it, but in {len(counts)} of "
                    f"{len(indices)} layers there is (a hybrid model whose other layers are recurrent?)"
                )
