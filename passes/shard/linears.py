"""Products with a weight: cut by the channels that they give (columns), or by those that they sum over (rows).

A column-parallel product needs its input whole and gives each rank its block of channels. A row-parallel one takes such
blocks and gives each rank a part of the sum; then comes an all_reduce, and the bias once. Which products are cut by
columns is decided in `plan.py`; rows follow from what arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import arg
from kvrewrite.passes.shard.placement import Placement, Split, Want, attribute_of
from kvrewrite.passes.shard.rules import Answer, Call, along

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """Where a product has its operands, by the number of the argument. sums: the weight's dimension that is summed over;
    gives: the one of the channels that it gives."""

    x: int
    weight: int
    bias: int | None
    sums: int
    gives: int


def product_of(target: Any, rank: int) -> Product | None:
    """What kind of product an op is. rank: how many dimensions the weight has."""
    if target is aten.linear.default:
        return Product(0, 1, 2, 1, 0) if rank == 2 else None
    if target is aten.addmm.default:
        return Product(1, 2, 0, 0, 1)
    if target in (aten.mm.default, aten.matmul.default):
        return Product(0, 1, None, 0, 1) if rank == 2 else None
    if target is aten._grouped_mm.default or str(target) == "transformers.grouped_mm_fallback.default":
        return Product(0, 1, None, 1, 2) if rank == 3 else None
    return None


def weight_of(node: fx.Node, ranks_of: Mapping[fx.Node, Any]) -> Product | None:
    """The product that a node is, if it is one with a weight that is an attribute of the graph."""
    if node.op != "call_function":
        return None
    for at in (1, 2):
        weight: Any = node.args[at] if at < len(node.args) else None
        shape = ranks_of.get(weight) if isinstance(weight, fx.Node) else None
        if not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
            continue
        found = product_of(node.target, len(shape))
        if found is None or found.weight != at:
            continue
        if attribute_of(weight, Split(0, (1,)), lambda n: len(ranks_of[n])) is None:
            continue
        return found if _bias(node, found) is None or _plain(node, found) else None
    return None


def _bias(node: fx.Node, product: Product) -> Any:
    if product.bias is None:
        return None
    return node.args[product.bias] if product.bias < len(node.args) else node.kwargs.get("bias")


def _plain(node: fx.Node, product: Product) -> bool:
    """Whether a bias has no factor (`addmm` may have)."""
    return node.target is not aten.addmm.default or (arg(node, "alpha") == 1 and arg(node, "beta") == 1)


def multiply(call: Call, product: Product, columns: tuple[int, ...] | None) -> Answer | None:
    """The rule of products with a weight. columns: the parts that are cut, where this one is cut by columns."""
    node = call.node
    x, weight, bias = node.args[product.x], node.args[product.weight], _bias(node, product)
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    split, last = call.split(x), call.rank(x) - 1
    if split is not None and split.dim == last:
        return _rows(call, product, x, weight, bias)
    if columns is not None and split is None:
        given = Split(product.gives, columns)
        wants: dict[fx.Node, Placement] = dict.fromkeys(node.all_input_nodes)
        wants[weight] = given
        if isinstance(bias, fx.Node):
            wants[bias] = Split((call.shape(bias) or (0,)).__len__() - 1, columns)
        return call.answer(wants.__getitem__, Split(call.rank(node) - 1, columns))
    if split is not None and product.bias != 0 and node.target is aten.linear.default:
        return along(call, x, [last], True)
    return None


def _rows(call: Call, product: Product, x: fx.Node, weight: fx.Node, bias: Any) -> Answer:
    split = call.split(x)
    assert split is not None
    wants: dict[fx.Node, Placement] = dict.fromkeys(call.node.all_input_nodes)
    wants |= {x: split, weight: split.at(product.sums)}
    found = call.answer(wants.__getitem__, None, reduce=True)
    if bias is not None:
        found.bias = Want(bias, None)
        args, kwargs = list(found.args), dict(found.kwargs)
        if call.target is aten.addmm.default:  # `write.py` makes it a product without one
            del args[0]
        elif len(args) > 2:
            del args[2:]
        kwargs.pop("bias", None)
        found.args, found.kwargs = tuple(args), kwargs
    return found
