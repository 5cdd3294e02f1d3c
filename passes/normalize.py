"""Brings a captured graph into the form that every later pass expects, without changing what it computes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from kvrewrite.capture import Captured
from kvrewrite.graph import erase_dead, is_op, mutates, tensor_of

aten = torch.ops.aten

# Their results depend on strides, so a copy before them may matter.
STRIDE_SENSITIVE = (aten.view_as_complex.default, aten.as_strided.default, aten.view.dtype)
VIEWS = (aten.view.default, aten._unsafe_view.default)
ALIASES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)
CASTS = ("aten::_to_copy", "aten::to", "aten::type_as", "aten::contiguous")


def normalize(captured: Captured) -> None:
    """Requires: a graph as `capture` makes it, without in-place ops (`run_decompositions({})`).

    Ensures: no assertions, no dead nodes, `reshape` in place of `view` (whose arguments were right for the strides of
    the trace only), and no copies, casts, slices or dropouts that do nothing.
    """
    gm = captured.graph
    copies_matter = any(n.target in STRIDE_SENSITIVE or mutates(n) for n in gm.graph.nodes)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_assertion(node):
            node.replace_all_uses_with(None)
            gm.graph.erase_node(node)
        elif node.target in VIEWS:
            node.target = aten.reshape.default
        elif (source := _copied(node, copies_matter)) is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()


def _schema_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_assertion(node: fx.Node) -> bool:
    name = _schema_name(node)
    return name.startswith(("aten::_assert", "aten::_functional_assert", "aten::sym_constrain_range"))


def _copied(node: fx.Node, copies_matter: bool) -> fx.Node | None:
    """The node whose value `node` only passes on, or None."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in ALIASES:
        return source
    if is_op(node, aten.slice.Tensor) and _is_whole(node):
        return source
    if is_op(node, aten.dropout.default):
        return None if _argument(node, 2, "train", True) and _argument(node, 1, "p", 0.5) else source
    if is_op(node, aten.clone.default):
        return None if copies_matter else source
    if _schema_name(node) in CASTS and not copies_matter:
        before, after = tensor_of(source), tensor_of(node)
        same = before is not None and after is not None
        if same and before.dtype == after.dtype and before.device == after.device:  # type: ignore[union-attr]
            return source
    return None


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice takes all of an axis, as x[:, 1:] does of the first."""
    start, end, step = (_argument(node, i, n, d) for i, n, d in ((2, "start", None), (3, "end", None), (4, "step", 1)))
    return start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= sys.maxsize))


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
