"""Rewrites every attention of a captured graph to the one source op that later passes know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import (
    arg,
    erase_dead,
    fake_value,
    is_op,
    named_args,
    placeholder,
    set_attr,
    shape_of,
    symbol,
    tensor_of,
)
from kvrewrite.ir.site import AttentionSite, NoSite
from kvrewrite.passes.canonical.biases import forget_probes
from kvrewrite.passes.canonical.find_attention import find_attention
from kvrewrite.passes.canonical.operands import Attention, Operand
from kvrewrite.passes.canonical.probe import refuse

aten = torch.ops.aten
SOURCE = torch.ops.kvrewrite.attention.default
# In a source node's meta: the name of the node that it replaced, and the node that replaced that. None: it was there
# before.
REPLACED, RESULT = "kvrewrite_replaced", "kvrewrite_result"


def add_call(gm: fx.GraphModule, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call at the graph's insertion point; runs `target` on the arguments' `meta["val"]` for its own."""
    node = gm.graph.call_function(target, args, kwargs)
    node.meta["val"] = fake_value(node)
    return node


def size_node(captured: Captured, dim: int) -> fx.Node:
    """Returns the graph's node for the batch size (dim 0) or length (dim 1) of `input_ids`; makes one if needed."""
    gm = captured.graph
    ids = placeholder(gm, "input_ids")
    assert ids is not None
    for user in ids.users:
        if is_op(user, aten.sym_size.int) and user.args == (ids, dim):
            return user
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.call_function(aten.sym_size.int, (ids, dim))
    node.meta["val"] = shape_of(ids)[dim]
    return node


def sizes_first(captured: Captured) -> tuple[fx.Node, fx.Node]:
    """Moves the nodes of batch size and length to the top of the graph, before all their users; returns both."""
    graph = captured.graph.graph
    nodes = size_node(captured, 0), size_node(captured, 1)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in nodes:
        last.append(node)
    return nodes


def canonicalize(captured: Captured) -> list[AttentionSite]:
    """Requires: a normalized graph.

    Ensures: every attention is one `kvrewrite.attention` node with its AttentionSite in `meta["kvrewrite_site"]`; no
    mask and no scores are left. Returns the sites in execution order. If an attention can't be rewritten, raises
    UnsupportedModelError with layer, module and reason; the graph is then half rewritten.
    """
    gm = captured.graph
    try:
        found = list(find_attention(captured))
    finally:
        forget_probes(captured)
    for layer, attention in enumerate(found):
        if isinstance(attention, NoSite):
            raise refuse(layer, attention.module, attention.reason)
    sizes = sizes_first(captured)
    sites: list[AttentionSite] = []
    owners: dict[tuple[fx.Node, fx.Node], int] = {}
    operands: dict[Any, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for attention in found:
        assert isinstance(attention, Attention)
        attention = _up_to_date(attention, replaced)
        made = _source_nodes(captured, attention, len(sites), sizes, operands)
        if RESULT in made[0].meta:
            replaced[attention.replaced] = made[0].meta[RESULT]
        for node in made:
            site = _site(attention, node, len(sites))
            owner = owners.setdefault((arg(node, "k"), arg(node, "v")), site.layer)
            site.shares_kv_with = owner if owner != site.layer else None
            node.meta["kvrewrite_site"] = site
            sites.append(site)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return sites


def _up_to_date(attention: Attention, replaced: dict[fx.Node, fx.Node]) -> Attention:
    """Updates an attention that reads the result of another one, which has been replaced."""

    def now(node: fx.Node) -> fx.Node:
        return replaced.get(node, node)

    q, k, v = (Operand(now(operand.node), operand.order) for operand in (attention.q, attention.k, attention.v))
    ready_k, ready_v = (None if node is None else now(node) for node in attention.unrepeated)
    return dataclasses.replace(attention, q=q, k=k, v=v, unrepeated=(ready_k, ready_v))


def _site(attention: Attention, node: fx.Node, layer: int) -> AttentionSite:
    args = named_args(node)
    q, k, v = args["q"], args["k"], args["v"]
    return AttentionSite(
        layer=layer,
        module=attention.module,
        heads=int(shape_of(q)[1]),
        kv_heads=int(shape_of(k)[1]),
        head_dim=int(shape_of(q)[3]),
        v_head_dim=int(shape_of(v)[3]),
        scale=attention.scale,
        source=attention.source,
        window=args["window"],
        chunk=args["chunk"],
        softcap=attention.softcap,
        sinks=args["sinks"] is not None,
        alibi=args["alibi"] is not None,
    )


def _source_nodes(
    captured: Captured,
    attention: Attention,
    layer: int,
    sizes: tuple[fx.Node, fx.Node],
    operands: dict[Any, fx.Node],
) -> list[fx.Node]:
    """Adds the source op for one attention, or one per mask if heads have different masks. Attention from the interface
    front end needs nothing."""
    if attention.anchor.target is SOURCE:
        return [attention.anchor]
    gm, replaced = captured.graph, attention.replaced
    with gm.graph.inserting_before(replaced):
        before = set(gm.graph.nodes)
        q = _operand(gm, attention.q, attention.heads, sizes, operands)
        kv = [
            ready
            if ready is not None
            else _operand(gm, operand, attention.kv_heads * attention.groups, sizes, operands, attention.groups)
            for operand, ready in zip((attention.k, attention.v), attention.unrepeated, strict=True)
        ]
        for factor, divides in attention.factors:
            q = _scaled(gm, q, factor, divides)
        sinks = _per_head(gm, attention.sinks, attention.heads)
        alibi = _slopes(gm, attention, layer, q)
        numbers = attention.scale, attention.softcap
        if attention.by_head is None:
            nodes = [add_call(gm, SOURCE, q, *kv, sinks, alibi, *numbers, attention.window, attention.chunk)]
            whole = nodes[0]
        else:
            nodes, whole = _by_head(gm, attention, layer, [q, *kv, sinks, alibi], numbers)
        result = _like_replaced(gm, whole, replaced, attention.out_order)
        for made in gm.graph.nodes:
            if made not in before:
                made.meta.setdefault("nn_module_stack", replaced.meta.get("nn_module_stack"))
    for node in nodes:
        node.meta[REPLACED], node.meta[RESULT] = replaced.name, result
    replaced.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result and user not in nodes)
    return nodes


def _by_head(
    gm: fx.GraphModule,
    attention: Attention,
    layer: int,
    operands: list[fx.Node | None],
    numbers: tuple[float, float],
) -> tuple[list[fx.Node], fx.Node]:
    """Adds one source op for the heads of each mask and joins their results (B, H, S, Dv) in the order of the heads."""
    assert attention.by_head is not None
    group = attention.heads // attention.kv_heads
    kinds = list(dict.fromkeys(attention.by_head))
    heads = {kind: [h for h, of_head in enumerate(attention.by_head) if of_head == kind] for kind in kinds}
    if any(len({attention.by_head[k * group + g] for g in range(group)}) > 1 for k in range(attention.kv_heads)):
        raise refuse(layer, attention.module, "query heads that share a kv head have different masks")

    def picked(node: fx.Node | None, which: list[int], dim: int) -> fx.Node | None:
        if node is None:
            return None
        if which == list(range(which[0], which[-1] + 1)):
            return add_call(gm, aten.slice.Tensor, node, dim, which[0], which[-1] + 1)
        parts = [add_call(gm, aten.slice.Tensor, node, dim, h, h + 1) for h in which]
        return add_call(gm, aten.cat.default, parts, dim)

    q, k, v, sinks, alibi = operands
    nodes = []
    for kind in kinds:
        own = heads[kind]
        kv_heads = sorted({h // group for h in own})
        given = [
            picked(q, own, 1),
            *(picked(x, kv_heads, 1) for x in (k, v)),
            picked(sinks, own, 0),
            picked(alibi, own, 0),
        ]
        nodes.append(add_call(gm, SOURCE, *given, *numbers, *kind))
    whole = add_call(gm, aten.cat.default, nodes, 1)
    order = [h for kind in kinds for h in heads[kind]]
    if order != sorted(order):
        parts = [add_call(gm, aten.slice.Tensor, whole, 1, order.index(h), order.index(h) + 1) for h in sorted(order)]
        whole = add_call(gm, aten.cat.default, parts, 1)
    return nodes, whole


def _operand(
    gm: fx.GraphModule,
    operand: Operand,
    heads: int,
    sizes: tuple[fx.Node, fx.Node],
    made: dict[Any, fx.Node],
    groups: int = 1,
) -> fx.Node:
    """Returns an operand as (B, heads / groups, S, D). Layers that share the operand (shared KV) get the same node."""
    key = (operand.node, operand.order, heads, groups)
    if key in made:
        return made[key]
    node = operand.node
    order = [d for d in operand.order if d >= 0]
    if order != sorted(order):
        node = add_call(gm, aten.permute.default, node, order)
    shape = shape_of(node)
    if len(shape) != 4 or symbol(shape[1]) != heads:
        node = add_call(gm, aten.reshape.default, node, [sizes[0], heads, sizes[1], int(shape[-1])])
    if groups > 1:
        node = add_call(gm, aten.slice.Tensor, node, 1, 0, heads, groups)
    made[key] = node
    return node


def _per_head(gm: fx.GraphModule, node: fx.Node | None, heads: int) -> fx.Node | None:
    if node is None or len(shape_of(node)) == 1:
        return node
    return add_call(gm, aten.reshape.default, node, [heads])


def _scaled(gm: fx.GraphModule, q: fx.Node, factor: fx.Node, divides: bool) -> fx.Node:
    """Multiplies the queries (B, H, S, D) by a factor of the scores, or divides them: one number, one per head, or
    (..., S, 1)."""
    by_query = isinstance(shape_of(factor)[-2] if len(shape_of(factor)) > 1 else 1, torch.SymInt)
    factor = add_call(gm, aten.reshape.default, factor, [-1, 1] if by_query else [-1, 1, 1])
    scaled = add_call(gm, aten.div.Tensor if divides else aten.mul.Tensor, q, factor)
    wanted = tensor_of(q)
    assert wanted is not None
    if tensor_of(scaled).dtype != wanted.dtype:  # type: ignore[union-attr]
        scaled = add_call(gm, aten._to_copy.default, scaled, dtype=wanted.dtype)
    return scaled


def _slopes(gm: fx.GraphModule, attention: Attention, layer: int, q: fx.Node) -> fx.Node | None:
    """Returns ALiBi slopes as a node: learned slopes stay where the model has them, constant slopes become a buffer."""
    if attention.slopes is None:
        return None
    if attention.slopes_node is not None:
        node, negated = attention.slopes_node
        if negated:
            node = add_call(gm, aten.neg.default, node)
        return _per_head(gm, node, attention.heads)
    like = tensor_of(q)
    assert like is not None
    name = f"kvrewrite_alibi_{layer}"
    slopes = attention.slopes
    set_attr(gm, name, slopes.to(like.device) if like.device.type != "meta" else slopes)
    node = gm.graph.get_attr(name)
    fake: Tensor = like.new_empty((attention.heads,), dtype=torch.float32)
    node.meta["val"] = fake
    return node


def _like_replaced(gm: fx.GraphModule, node: fx.Node, replaced: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """Reshapes the attention's (B, H, S, Dv) to the shape of the replaced node."""
    wanted = tensor_of(replaced)
    assert wanted is not None
    rank = len(order)
    inverse = [order.index(i) for i in range(rank)]
    leading = [wanted.shape[inverse[i]] for i in range(rank)]
    result = node
    if [symbol(s) for s in leading] != [symbol(s) for s in shape_of(node)]:
        shape = [-1 if isinstance(s, torch.SymInt) and i == 0 else s for i, s in enumerate(leading)]
        # The remaining dim is the batch (times heads); the length comes from the op's own result.
        length = add_call(gm, aten.sym_size.int, node, 2)
        shape = [length if isinstance(s, torch.SymInt) else s for s in shape]
        result = add_call(gm, aten.reshape.default, result, shape)
    if list(order) != list(range(rank)):
        result = add_call(gm, aten.permute.default, result, list(order))
    if tensor_of(result).dtype != wanted.dtype:  # type: ignore[union-attr]
        result = add_call(gm, aten._to_copy.default, result, dtype=wanted.dtype)
    return result


def check_no_scores(captured: Captured) -> None:
    """Refuses graphs that still compute a tensor of size length x length."""
    for node in captured.graph.graph.nodes:
        value = tensor_of(node)
        if value is not None and sum(symbol(s) == captured.length_symbol for s in value.shape) >= 2:
            module = node.meta.get("kvrewrite_module") or ""
            raise UnsupportedModelError(
                f"{node.name} ({node.target}{', ' + module if module else ''}) of shape {tuple(map(str, value.shape))} "
                "is left after every attention was rewritten: the model computes something between all pairs of tokens "
                "that kvrewrite does not know as attention"
            )
