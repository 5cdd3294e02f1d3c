"""Fuses the linear layers of a graph that runs single tokens, so that each weight is read by a kernel made for it.

Requires a flat graph of aten ops, as rewritten models have. Ensures the same values up to the order of sums (on the CPU the
same bits), with

    act(linear(x, gate)) * linear(x, up)   as   kvrewrite.gated_linear   (silu, gelu, gelu_tanh; no biases)
    linears of the same x                  as   kvrewrite.linears        (q, k, v and a folded retaining head)
    residual + linear(x, w, b)             as   kvrewrite.linear_add

Only linears whose weights and biases are attributes of the graph are touched: those are there at any place in it, and nothing
else but x matters to a linear, so it may move to where another reads x, across ops that mutate caches. Where x, or what it is
a view of, is itself written to, the linear stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import kvrewrite.ops  # noqa: F401  (registers the ops)
from kvrewrite.ir.fx import erase_dead, get_attr, is_op, mutates, same_size, tensor_of
from kvrewrite.ops.linear import MAX_WEIGHTS

aten = torch.ops.aten
ops = torch.ops.kvrewrite


def fuse_linears(gm: fx.GraphModule, *, singles: bool = False) -> int:
    """Fuses in place; returns how many linear layers went into fused ops.

    singles: the ones that are left (lm_head, a fused qkv projection) become `kvrewrite.linears` of one weight, too, so that the
    kernels serve them.
    """
    fused = fuse_gates(gm) + _fuse_groups(gm) + _fuse_adds(gm)
    if singles:
        for node in _linears(gm):
            _emit_group(gm, [node])
            fused += 1
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return fused


# ---------------------------------------------------------------------------------------------------------- what there is
def _linears(gm: fx.GraphModule) -> list[fx.Node]:
    """The linears that may be fused, in graph order."""
    written = {_base(n) for node in gm.graph.nodes if mutates(node) for n in _written(node)}
    return [n for n in gm.graph.nodes if is_op(n, aten.linear.default) and _movable(gm, n, written)]


def _written(node: fx.Node) -> list[fx.Node]:
    """The nodes that a mutating op writes to."""
    found: list[fx.Node] = []
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found.extend(v for v in values if isinstance(v, fx.Node))
    return found


def _base(node: fx.Node) -> fx.Node:
    """What a chain of views looks at."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], fx.Node):
        if node.target._schema.arguments[0].alias_info is None:
            break
        node = node.args[0]
    return node


def _movable(gm: fx.GraphModule, node: fx.Node, written: set[fx.Node]) -> bool:
    x, weight, bias = _operands(node)
    if node.kwargs or not isinstance(x, fx.Node) or _base(x) in written:
        return False
    attributes = [n for n in (weight, bias) if n is not None]
    if any(not isinstance(n, fx.Node) or n.op != "get_attr" or n in written for n in attributes):
        return False
    w, *rest = (_attribute(gm, n) for n in attributes)
    value = tensor_of(x)
    if not isinstance(w, Tensor) or w.dim() != 2 or not w.is_contiguous() or not w.is_floating_point():
        return False
    if any(b.dtype != w.dtype or b.shape != w.shape[:1] or not b.is_contiguous() for b in rest):
        return False
    return value is None or (value.dtype == w.dtype and value.dim() >= 2)


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    """x, weight and bias or None."""
    return (*linear.args, None)[:3]  # type: ignore[return-value]


def _attribute(gm: fx.GraphModule, node: Any) -> Tensor:
    """The parameter that a `get_attr` node reads."""
    value: Tensor = get_attr(gm, str(node.target))
    return value


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _uses(node: fx.Node, target: fx.Node) -> int:
    """How often `node` has `target` among its arguments."""
    return sum(a is target for a in node.args)


# ---------------------------------------------------------------------------------------------------------- gate * up
def fuse_gates(gm: fx.GraphModule, suits: Callable[[Tensor, str], bool] = lambda weight, activation: True) -> int:
    """Fuses gate and up in place where `suits` says so of gate's weight and the activation; returns how many linears went."""
    linears = {n for n in _linears(gm) if len(n.args) == 2 or n.args[2] is None}
    fused = 0
    for gate in [n for n in gm.graph.nodes if n in linears]:
        active = _only_user(gate)
        name = activation_of(active)
        if active is None or name is None:
            continue
        product = _only_user(active)
        if product is None or not is_op(product, aten.mul.Tensor) or _uses(product, active) != 1:
            continue
        up = next(a for a in product.args if a is not active)
        if not isinstance(up, fx.Node) or up not in linears or _only_user(up) is not product:
            continue
        (x, w_gate, _), (other, w_up, _) = _operands(gate), _operands(up)
        first, second = _attribute(gm, w_gate), _attribute(gm, w_up)
        if x is not other or first.shape != second.shape or first.dtype != second.dtype or not suits(first, name):
            continue
        with gm.graph.inserting_before(product):
            node = gm.graph.call_function(ops.gated_linear.default, (x, w_gate, w_up, name))
        _replace(gm, product, node)
        for old in (active, gate, up):
            gm.graph.erase_node(old)
        linears -= {gate, up}
        fused += 2
    return fused


def activation_of(node: fx.Node | None) -> str | None:
    """What kvrewrite.gated_linear calls the activation that `node` computes."""
    if node is None or len(node.args) != 1:
        return None
    if node.target == aten.silu.default:
        return "silu"
    if node.target == aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return None


# ---------------------------------------------------------------------------------------------------------- linears of one x
def _fuse_groups(gm: fx.GraphModule) -> int:
    groups: dict[tuple[Any, torch.dtype], list[fx.Node]] = {}
    for node in _linears(gm):
        groups.setdefault((node.args[0], _attribute(gm, node.args[1]).dtype), []).append(node)
    fused = 0
    for members in groups.values():
        for at in range(0, len(members), MAX_WEIGHTS):
            part = members[at : at + MAX_WEIGHTS]
            if len(part) > 1:
                _emit_group(gm, part)
                fused += len(part)
    return fused


def _emit_group(gm: fx.GraphModule, members: list[fx.Node]) -> None:
    """One kvrewrite.linears where the first of the members is; their weights' nodes go before it."""
    first = members[0]
    operands = [_operands(n) for n in members]
    before = set()
    for node in gm.graph.nodes:
        if node is first:
            break
        before.add(node)
    for _, weight, bias in operands:
        for attribute in (weight, bias):
            if attribute is not None and attribute not in before:
                first.prepend(attribute)
                before.add(attribute)
    with gm.graph.inserting_before(first):
        weights, biases = [w for _, w, _ in operands], [b for _, _, b in operands]
        group = gm.graph.call_function(ops.linears.default, (first.args[0], weights, biases))
        parts = [gm.graph.call_function(operator.getitem, (group, i)) for i in range(len(members))]
    values = [tensor_of(n) for n in members]
    if all(v is not None for v in values):
        group.meta["val"] = values
    for old, new in zip(members, parts, strict=True):
        _replace(gm, old, new)


# ---------------------------------------------------------------------------------------------------------- + residual
def _fuse_adds(gm: fx.GraphModule) -> int:
    fused = 0
    linears = _linears(gm)
    candidates = set(linears)
    for node in reversed(linears):  # of a sum of two linears the later one; the other one is then its residual
        total = _only_user(node)
        if node not in candidates or total is None or not is_op(total, aten.add.Tensor):
            continue
        if total.kwargs or len(total.args) != 2 or _uses(total, node) != 1:
            continue
        residual = next(a for a in total.args if a is not node)
        if not _alike(residual, node):
            continue
        x, weight, bias = _operands(node)
        with gm.graph.inserting_before(total):
            new = gm.graph.call_function(ops.linear_add.default, (x, weight, bias, residual))
        _replace(gm, total, new)
        gm.graph.erase_node(node)
        candidates.discard(node)
        fused += 1
    return fused


def _alike(a: Any, b: fx.Node) -> bool:
    """Whether both are known to be tensors of one shape, dtype and device."""
    first, second = tensor_of(a), tensor_of(b)
    if first is None or second is None or first.dim() != second.dim():
        return False
    same = all(same_size(i, j) for i, j in zip(first.shape, second.shape, strict=True))
    return same and first.dtype == second.dtype and first.device == second.device


def _replace(gm: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    """`new` instead of `old`, with what is known about it."""
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
