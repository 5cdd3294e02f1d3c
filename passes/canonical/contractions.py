"""Describes matrix products, whatever op they are: which axes of the operands are summed and which are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import is_op, shape_of, symbol
from kvrewrite.passes.canonical.operands import NoAttention, Operand

aten = torch.ops.aten
CONTRACTIONS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


@dataclass
class Contraction:
    """A product of two tensors over one dim: out[lead, m, n] = sum over c of left[lead, m, c] * right[lead, c, n].

    `left` is permuted to (lead..., m, c), `right` to (lead..., n, c); `out_order` permutes (lead..., m, n) into the
    node's own order.
    """

    node: fx.Node
    left: Operand
    right: Operand
    out_order: tuple[int, ...]


def contraction(node: fx.Node, left: fx.Node | None = None) -> Contraction:
    """Describes `node` as a Contraction. left: the operand to be the left one; default: that of the result's dim -2."""
    if is_op(node, aten.einsum.default):
        return _einsum(node, left)
    first, second = node.args[1:3] if is_op(node, aten.baddbmm.default) else node.args[:2]  # type: ignore[misc]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    if left is not None and first is not left:
        raise NoAttention("the attention weights are the right operand of their product with the values")
    a, b = len(shape_of(first)), len(shape_of(second))
    if a < 3 or a != b:
        raise NoAttention(f"operands of {a} and {b} dims; expected batched matrices")
    identity = tuple(range(a))
    swapped = (*range(a - 2), a - 1, a - 2)
    right = Operand(second, swapped)
    if is_op(second, aten.transpose.int) and {d % a for d in second.args[1:]} == {a - 2, a - 1}:  # type: ignore[operator]
        assert isinstance(second.args[0], fx.Node)
        right = Operand(second.args[0], identity)
    return Contraction(node, Operand(first, identity), right, identity)


def _einsum(node: fx.Node, left: fx.Node | None) -> Contraction:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "->" not in equation or "." in equation or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        raise NoAttention(f"the einsum {equation!r} is none of two named operands")
    inputs, out = equation.split("->")
    letters = inputs.split(",")
    pairs = list(zip(letters, operands, strict=True))
    if any(len(set(s)) != len(s) for s in (*letters, out)):
        raise NoAttention(f"the einsum {equation!r} takes diagonals")
    if left is None:
        if out[-2] not in letters[0]:
            pairs.reverse()
    elif pairs[0][1] is not left:
        pairs.reverse()
    (a, first), (b, second) = pairs
    summed = [c for c in a if c in b and c not in out]
    free = [c for c in out if c not in a]
    own = [c for c in out if c not in b]
    only_summed = set(a) - set(out) == set(b) - set(out) == set(summed)
    if len(summed) != 1 or len(free) != 1 or not own or not only_summed:
        raise NoAttention(f"the einsum {equation!r} is not a product of batched matrices")
    # In weights (..., query, key) the query is the second to last dim, wherever the result has it.
    m = out[-2] if left is None else a[-2]
    if m not in own:
        raise NoAttention(f"the einsum {equation!r} mixes queries and keys")
    lead = [c for c in out if c not in (m, free[0])]
    if any(c not in a for c in lead):
        raise NoAttention(f"the einsum {equation!r} has batch dims that only the keys have")
    order_a = tuple(a.index(c) for c in (*lead, m, summed[0]))
    # Lead dims that `right` lacks (query heads of a group) are marked -1 and become dims of size 1.
    order_b = tuple(b.find(c) for c in (*lead, free[0], summed[0]))
    canonical = [*lead, m, free[0]]
    return Contraction(node, Operand(first, order_a), Operand(second, order_b), tuple(canonical.index(c) for c in out))


def groups_last(captured: Captured, qk: Contraction, av: Contraction) -> tuple[Contraction, Contraction]:
    """Reorders both products of an attention to the same lead dims; those over which keys and values are broadcast come
    last. Then the query heads of one kv head are adjacent, as the canonical op has them.
    """
    rank = len(av.left.order)
    if len(qk.left.order) != rank or sorted(av.left.order) != list(range(rank)):
        return qk, av  # the weights have other dims than the scores
    # Lead dims of both in the order of the weights.
    qk = _reordered(qk, sorted(range(rank - 2), key=lambda i: qk.out_order.index(i)))
    av = _reordered(av, sorted(range(rank - 2), key=lambda i: av.left.order[i]))

    def broadcast(operand: Operand, i: int) -> bool:
        dim = operand.order[i]
        return dim < 0 or symbol(shape_of(operand.node)[dim]) == 1

    queries = shape_of(qk.left.node)
    missing = [
        i
        for i in range(rank - 2)
        if broadcast(qk.right, i) and broadcast(av.right, i) and symbol(queries[qk.left.order[i]]) != 1
    ]
    order = [*(i for i in range(rank - 2) if i not in missing), *missing]
    return _reordered(qk, order), _reordered(av, order)


def _reordered(product: Contraction, lead: list[int]) -> Contraction:
    """Returns a contraction with its lead dims in another order."""
    order = [*lead, len(lead), len(lead) + 1]
    left, right = (
        Operand(operand.node, tuple(operand.order[i] for i in order)) for operand in (product.left, product.right)
    )
    return Contraction(product.node, left, right, tuple(order.index(i) for i in product.out_order))
