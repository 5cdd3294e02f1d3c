"""Normalizes a captured graph to the form that later passes expect, without changing what it computes."""

from __future__ import annotations

import string
import sys
from typing import Any

import torch
from torch import fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import ZEROED, clear_memory, erase_dead, fake_value, is_op, mutates, symbol, tensor_of

aten = torch.ops.aten

# Their results depend on strides, so a copy before them may matter.
STRIDE_SENSITIVE = (aten.view_as_complex.default, aten.as_strided.default, aten.view.dtype)
VIEWS = (aten.view.default, aten._unsafe_view.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
ALIASES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)
CASTS = ("aten::_to_copy", "aten::to", "aten::type_as", "aten::contiguous")


def normalize(captured: Captured) -> None:
    """Requires: a graph from `capture`, without in-place ops (`run_decompositions({})`).

    Ensures: no assertions; no dead nodes; `reshape` instead of `view` (whose arguments only fit the strides of the
    trace); letters for all axes of an einsum; no product of two transposed matrices; zeros instead of uninitialized
    memory; histograms that run on CPU and GPU; no copies, casts, slices or dropouts that do nothing.
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
        elif node.target in ZEROED:
            clear_memory(node)
        elif is_op(node, aten.histc.default):
            _count_in_floats(gm, node)
        elif (source := _copied(node, copies_matter)) is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if is_op(node, aten.einsum.default):
            _name_all_axes(node)
        elif is_op(node, *PRODUCTS):
            _turn_around(gm, node)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()


def _name_all_axes(node: fx.Node) -> None:
    """Replaces the "..." of an einsum with letters, and writes out the result if it is implied by the operands."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(operands, (list, tuple))
    if "..." not in equation or "->" not in equation:
        return
    inputs, _, result = equation.partition("->")
    terms = inputs.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    more = [len(tensor_of(x).shape) - len(t) + 3 if "..." in t else 0 for t, x in zip(terms, operands, strict=True)]  # type: ignore[union-attr]
    most = max(more)
    if most > len(free):
        return
    letters = "".join(free[:most])  # the axes match when counted from the last
    terms = [t.replace("...", letters[most - m :]) for t, m in zip(terms, more, strict=True)]
    # Axes of size 1 are broadcast only under "..."; a letter must have one size.
    sizes: dict[str, set[Any]] = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, size in zip(term, tensor_of(x).shape, strict=True):  # type: ignore[union-attr]
            sizes.setdefault(letter, set()).add(symbol(size))
    if any(len(sizes[c]) > 1 for c in letters):
        return
    node.args = (f"{','.join(terms)}->{result.replace('...', letters)}", operands)


def _count_in_floats(gm: fx.GraphModule, node: fx.Node) -> None:
    """Computes a histogram of integers in float64. The CPU has no kernel for integers (a GPU has both), and a graph
    that was captured on one must run on the other. Routers of mixtures of experts do this on a GPU with
    `histc(ids.int())`."""
    source, own = node.args[0], tensor_of(node)
    given = tensor_of(source)
    if given is None or own is None or given.is_floating_point():
        return
    assert isinstance(source, fx.Node)
    with gm.graph.inserting_before(node):
        wide = gm.graph.call_function(aten._to_copy.default, (source,), {"dtype": torch.float64})
        counts = gm.graph.call_function(node.target, (wide, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]
        turned = gm.graph.call_function(aten._to_copy.default, (counts,), {"dtype": own.dtype})
    for made in (wide, counts, turned):
        made.meta.update(node.meta)
        made.meta["val"] = fake_value(made)
    node.replace_all_uses_with(turned)
    gm.graph.erase_node(node)


def _turn_around(gm: fx.GraphModule, node: fx.Node) -> None:
    """Rewrites A' B' as (B A)' and removes a transpose that follows."""
    before = [_transposed(n) for n in node.args[:2]]
    if None in before:
        return
    left, right = before
    with gm.graph.inserting_before(node):
        product = gm.graph.call_function(node.target, (right, left))  # type: ignore[arg-type]
        product.meta.update(node.meta)
        product.meta["val"] = fake_value(product)
        result = gm.graph.call_function(aten.transpose.int, (product, -2, -1))
        result.meta.update(node.meta)
    for user in list(node.users):
        if _transposed(user) is node:
            user.replace_all_uses_with(product)
    node.replace_all_uses_with(result)


def _transposed(node: Any) -> fx.Node | None:
    """Returns the node whose last two axes `node` exchanges, or None."""
    if not is_op(node, aten.transpose.int, aten.permute.default, aten.mT.default):
        return None
    source: Any = node.args[0]
    value = tensor_of(source)
    if value is None or value.dim() < 3:
        return None
    rank = value.dim()
    if is_op(node, aten.permute.default):
        order = [d % rank for d in node.args[1]]
        swaps = order == [*range(rank - 2), rank - 1, rank - 2]
    else:
        swaps = is_op(node, aten.mT.default) or {d % rank for d in node.args[1:3]} == {rank - 2, rank - 1}
    return source if swaps else None


def _schema_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_assertion(node: fx.Node) -> bool:
    name = _schema_name(node)
    return name.startswith(("aten::_assert", "aten::_functional_assert", "aten::sym_constrain_range"))


def _copied(node: fx.Node, copies_matter: bool) -> fx.Node | None:
    """Returns the node whose value `node` only passes on, or None."""
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
