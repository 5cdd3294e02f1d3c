"""Folds the first layer of a retaining head into one linear layer of the hidden states.

Locret's score is fc2(act(fc1([q | k | v]))) of the raw projections. Where those are plain linears of the same h,

    fc1([Wq h + bq | Wk h + bk | Wv h + bv]) = (W1 [Wq; Wk; Wv]) h + W1 [bq; bk; bv] + b1

exactly, in real numbers. The product is made once, in fp64, and rounded once to the model's dtype: less to read and to
multiply, and a fourth linear of h that goes along with q, k and v (see fuse_linears.py).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from kvrewrite.ir.fx import erase_dead, get_attr, is_op, set_attr, tensor_of
from kvrewrite.policies.site import PREFIX

aten = torch.ops.aten
FOLDED = "folded."
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


class Fold(NamedTuple):
    """One folded layer: the attributes of the graph that were made, and the policy weights that it no longer reads."""

    weight: str
    bias: str | None
    unused: tuple[str, ...]


def fold_heads(gm: fx.GraphModule) -> list[Fold]:
    """Folds in place; returns what was folded, in graph order. Empty where nothing has that form.

    Requires a flat graph of aten ops with policy weights as attributes `policy_weights.<name>`. Ensures that each
    linear(cat([linear(h, Wq), ...]), W1) with such a W1 is linear(h, folded.<layer>.weight, folded.<layer>.bias), and that
    nodes nobody needs any more are gone. The parameters that they read stay in the module: artifacts are written from them.
    """
    folds: list[Fold] = []
    for node in list(gm.graph.nodes):
        if is_op(node, aten.linear.default) and _is_policy_weight(node.args[1]):
            found = _projections(gm, node)
            if found is not None:
                folds.append(_fold(gm, node, *found, name=_name(node, len(folds))))
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    still_read = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    return [f._replace(unused=tuple(n for n in f.unused if n not in still_read)) for f in folds]


def _is_policy_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target).startswith(PREFIX)


def _name(node: fx.Node, index: int) -> str:
    """folded.<layer>, the layer as the policy weight's name has it."""
    found = re.search(r"layers\.(\d+)\.", str(node.args[1].target))  # type: ignore[union-attr]
    return f"{FOLDED}{found.group(1) if found else index}"


def _projections(gm: fx.GraphModule, head: fx.Node) -> tuple[list[fx.Node], list[Any] | None] | None:
    """The linears of one h whose outputs side by side are the input of `head`, and the shape that they are reshaped to.

    All parts are reshaped to the same leading sizes and as many channels as W1 has come out. As they have the same number of
    rows, each keeps its channels, so a reshape only regroups rows and may as well follow the folded layer.
    """
    x = head.args[0]
    if head.kwargs or not isinstance(x, fx.Node):
        return None
    parts: list[Any] = [x]
    if is_op(x, aten.cat.default):
        if len(x.args) != 2 or x.args[1] != -1 or x.kwargs or not isinstance(x.args[0], (list, tuple)):
            return None
        parts = list(x.args[0])
    linears: list[fx.Node] = []
    shapes: list[list[Any] | None] = []
    for part in parts:
        shape: Any = None
        if is_op(part, *RESHAPES):
            part, shape = part.args
            if not isinstance(shape, (list, tuple)) or len(shape) != 3 or shape[-1] != -1:
                return None
        if not is_op(part, aten.linear.default) or part.kwargs or any(n.op != "get_attr" for n in _parameters(part)):
            return None
        linears.append(part)
        shapes.append(None if shape is None else list(shape))
    if len({n.args[0] for n in linears}) != 1 or any(s != shapes[0] for s in shapes):
        return None
    tensors = [t for n in [head, *linears] for t in _tensors(gm, n)]
    if not all(t.is_floating_point() for t in tensors):
        return None
    if _tensors(gm, head)[0].shape[1] != sum(_tensors(gm, n)[0].shape[0] for n in linears):
        return None
    return linears, shapes[0]


def _parameters(linear: fx.Node) -> list[fx.Node]:
    """Weight and, where it has one, bias."""
    return [n for n in linear.args[1:] if isinstance(n, fx.Node)]


def _tensors(gm: fx.GraphModule, linear: fx.Node) -> list[Tensor]:
    """The values of `_parameters`."""
    return [get_attr(gm, str(n.target)).detach() for n in _parameters(linear)]


def _fold(gm: fx.GraphModule, head: fx.Node, linears: list[fx.Node], shape: list[Any] | None, name: str) -> Fold:
    w1, *bias = _tensors(gm, head)
    pieces = w1.double().split([_tensors(gm, n)[0].shape[0] for n in linears], dim=1)
    weight = torch.zeros((), dtype=torch.float64, device=w1.device)
    constant = bias[0].double() if bias else None
    for piece, linear in zip(pieces, linears, strict=True):
        w, *b = _tensors(gm, linear)
        weight = weight + piece @ w.double()
        if b:
            constant = piece @ b[0].double() + (0 if constant is None else constant)
    names = []
    for leaf, value in (("weight", weight), ("bias", constant)):
        if value is not None:
            names.append(f"{name}.{leaf}")
            set_attr(gm, names[-1], torch.nn.Parameter(value.to(w1.dtype), requires_grad=False))
    with gm.graph.inserting_before(head):
        folded = gm.graph.call_function(
            aten.linear.default, (linears[0].args[0], *(gm.graph.get_attr(n) for n in names))
        )
        result = folded if shape is None else gm.graph.call_function(aten.reshape.default, (folded, shape))
    h = tensor_of(linears[0].args[0])
    for node in (folded, result):
        node.meta = dict(head.meta)
        if h is not None and h.dim() == 3:
            node.meta["val"] = h.new_empty(*h.shape[:-1], weight.shape[0])
    unused = tuple(str(n.target) for n in _parameters(head))
    head.replace_all_uses_with(result)
    gm.graph.erase_node(head)
    return Fold(names[0], names[1] if len(names) > 1 else None, unused)
