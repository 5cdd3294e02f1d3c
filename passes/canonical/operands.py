"""Describes the operands of an attention: its heads, and keys and values before they are repeated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import ancestors, module_path, shape_of, symbol, tensor_of
from kvrewrite.passes.canonical.learned import other_values
from kvrewrite.passes.canonical.probe import Probe, is_projection, symbols

SMALL_BATCH, SMALL_LENGTH = 2, 7
Unrepeated = tuple[fx.Node | None, fx.Node | None]


class NoAttention(Exception):
    """The reason why an anchor is not an attention that can be rewritten."""


@dataclass
class Operand:
    """A tensor of a site, and the permutation that brings it to (lead..., length, features).

    An entry of -1 in `order` stands for a dim that the tensor does not have (it is broadcast over it).
    """

    node: fx.Node
    order: tuple[int, ...]


@dataclass
class Attention:
    """What an anchor computes.

    replaced: the node that holds the attention's result; out_order: its dims, as a permutation of (lead..., length,
    features). groups: how many times every kv head is repeated in k and v (1: not repeated); unrepeated: k and v before
    the repeat, if the graph has them. sinks: node with one extra logit per head (attention sinks). slopes: ALiBi's,
    fp32; slopes_node: for learned slopes, the node that holds them and whether it has them negated. factors: learned
    numbers, one or one per head, that multiply the scores (divide them if the flag is set) besides `scale`. by_head:
    (window, chunk) per head, if they differ.
    """

    anchor: fx.Node
    replaced: fx.Node
    module: str
    source: str
    q: Operand
    k: Operand
    v: Operand
    heads: int
    kv_heads: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    chunk: int = 0
    groups: int = 1
    sinks: fx.Node | None = None
    slopes: Tensor | None = None
    slopes_node: tuple[fx.Node, bool] | None = None
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    by_head: list[tuple[int, int]] | None = None
    unrepeated: Unrepeated = (None, None)
    out_order: tuple[int, ...] = ()


def mentions(captured: Captured, size: Any) -> bool:
    return captured.length_symbol in getattr(symbol(size), "free_symbols", ())


def is_length(captured: Captured, size: Any) -> bool:
    return bool(symbol(size) == captured.length_symbol)


def module_of(node: fx.Node) -> str:
    return str(node.meta.get("kvrewrite_module") or module_path(node))


def check_operands(captured: Captured, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[int, int]:
    """Returns (heads, kv heads) of q, k, v (..., length, features); refuses cross-attention and odd ranks."""
    for name, node in (("query", q), ("key", k), ("value", v)):
        shape = shape_of(node)
        if not 3 <= len(shape) <= 4 or not is_length(captured, shape[-2]):
            raise NoAttention(
                f"its {name} has the shape {tuple(map(str, shape))}; expected (batch, heads, length, features) with "
                "the length of the input (cross-attention and memories are not supported)"
            )
    return heads_of(captured, q), heads_of(captured, k)


def heads_of(captured: Captured, node: fx.Node) -> int:
    """Returns the heads of a (B, H, S, D) or (B * H, S, D) operand."""
    shape = shape_of(node)
    if len(shape) == 4:
        return int(shape[1])
    return ratio_of(captured, shape[:1])


def ratio_of(captured: Captured, lead: tuple[Any, ...]) -> int:
    """Returns how many heads the sizes `lead`, whose product is batch * heads, stand for."""
    counts = set()
    for batch in (3, 5):
        sizes = symbols(captured, batch, 7)
        product = 1
        for size in lead:
            expr = symbol(size)
            product *= int(expr.subs(sizes)) if hasattr(expr, "subs") else int(expr)
        counts.add(product / batch)
    if len(counts) != 1 or not (heads := counts.pop()).is_integer():
        raise NoAttention(f"batch and heads can't be told apart in the dims {tuple(map(str, lead))}")
    return int(heads)


def as_heads(value: Tensor, operand: Operand, batch: int) -> Tensor:
    """Returns an operand's value as (B, heads, S, D)."""
    value = value.permute([d for d in operand.order if d >= 0])
    return value.reshape(batch, -1, *value.shape[-2:])


def repeats(captured: Captured, k: Operand, v: Operand, heads: int) -> tuple[int, Unrepeated]:
    """Returns how often every kv head is repeated in k and v, and nodes (B, Hkv, S, D) from before the repeat."""
    learned = other_values(captured, ancestors([k.node, v.node], stop=is_projection), 1)
    probe = Probe(captured, SMALL_BATCH, SMALL_LENGTH, learned, cut=is_projection)
    values = [as_heads(probe(o.node), o, SMALL_BATCH) for o in (k, v)]
    for groups in (g for g in range(heads, 1, -1) if heads % g == 0):
        kept = [x[:, ::groups] for x in values]
        if all(torch.equal(x, y.repeat_interleave(groups, dim=1)) for x, y in zip(values, kept, strict=True)):
            found = [_before_repeat(probe, o.node, y) for o, y in zip((k, v), kept, strict=True)]
            return groups, (found[0], found[1])
    return 1, (None, None)


def _before_repeat(probe: Probe, node: fx.Node, kept: Tensor) -> fx.Node | None:
    """Returns an input of `node` that already is (B, Hkv, S, D), so that the repeat need not be computed."""
    for _ in range(12):
        if len(node.all_input_nodes) < 1 or not isinstance(node.args[0], fx.Node) or probe.cut(node):
            return None
        node = node.args[0]
        value = tensor_of(node)
        if value is not None and value.dim() == 4 and probe.shape(node) == tuple(kept.shape):
            return node if torch.equal(probe(node), kept) else None
    return None
