"""Finds rotary embeddings by dependence, not by pattern.

Requires the canonical graph. The rotation of a site's key is the nodes between its projection and the attention that
depend on `position_ids`; the last tensor before them is the key without a position. Whatever the variant (halves,
interleaved, partial, complex, scaled), evaluating it shows what it does: it must be linear and pair channels, so that y
= cos(p) * x + sin(p) * x[partner]. Anything else is reported as not found, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from kvrewrite.ir.fx import ancestors, fingerprint, get_attr, is_size, same_size, set_attr, shape_of, tensor_of
from kvrewrite.ir.projections import is_weight_op

aten = torch.ops.aten


@dataclass
class Rope:
    """The rotation of one site's keys.

    pre: the node of the key before the rotation; layout: the axis in `pre` of each of (B, Hkv, T, D). table: a graph
    `positions (N,) -> (cos (N, D), sin (N, D))` whose attributes live in the main graph, and its dtype; partner: (D,)
    channel pairs.
    """

    pre: fx.Node
    layout: tuple[int, int, int, int]
    table: fx.GraphModule
    dtype: torch.dtype
    partner: Tensor
    signature: str


@dataclass
class NoRope:
    """The reason why a site's rotation can't be used; falsy. `rotated`: whether there is any rotation."""

    reason: str
    rotated: bool

    def __bool__(self) -> bool:
        return False


def depends(region: set[fx.Node], roots: set[fx.Node]) -> set[fx.Node]:
    """Returns the nodes of `region` whose values (not sizes) depend on `roots`."""
    found = set(roots)
    for node in sorted(region):
        if node not in found and not is_size(node) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def find_rope(
    gm: fx.GraphModule,
    key: fx.Node,
    kv_heads: int,
    position_ids: fx.Node | None,
    limit: int | None = None,
    known: dict[Any, Rope] | None = None,
) -> Rope | NoRope:
    """Finds the rotation of `key`, the (B, Hkv, T, D) argument of an attention site; limit: positions that tables have.

    known: collects the rotations found in `gm`; a layer that rotates like an earlier one shares its table.
    """
    region = ancestors([key], stop=is_weight_op)
    if position_ids is None or position_ids not in region:
        return NoRope("its keys do not depend on positions", rotated=False)
    rotated = depends(region, {position_ids})
    leaves = {n for n in region if is_weight_op(n) and n.op == "call_function"}
    data = depends(region - leaves, leaves)
    rotation = (rotated & data) - leaves
    if not rotation:
        return NoRope("its keys do not depend on positions", rotated=False)
    frontier = {n for node in rotation for n in node.all_input_nodes if n in data and n not in rotation}
    # Walk back to the last tensor that everything passes through and that has the key's shape (a complex view does
    # not).
    layout = None
    while layout is None:
        latest = max(frontier)
        if len(frontier) == 1:
            layout = _layout(latest, key, kv_heads)
            if layout is not None:
                break
        if latest in leaves:
            return NoRope(
                "its keys are put together from several projections before the rotation (MLA)"
                if len(frontier) > 1
                else f"before the rotation its keys never have {kv_heads} kv heads of {shape_of(key)[3]} channels",
                rotated=True,
            )
        frontier.remove(latest)
        frontier |= {n for n in latest.all_input_nodes if n in data}
    pre = frontier.pop()
    inside = sorted(ancestors([key], stop=lambda n: n is pre) - {pre})
    for node in inside:
        if (
            node.op == "placeholder"
            and node is not position_ids
            and not all(is_size(u) for u in node.users if u in inside)
        ):
            return NoRope(f"the rotation depends on {node.name}", rotated=True)
        if node in leaves:
            return NoRope("the rotation mixes in another projection", rotated=True)
    root, graph = _replay_graph(gm, inside, pre, layout, key, position_ids)
    dim = int(shape_of(key)[3])
    rotates = fingerprint(graph), kv_heads, dim, limit
    if known is not None and rotates in known:
        return replace(known[rotates], pre=pre, layout=layout)
    replay = fx.GraphModule(root, graph, class_name="Rotation")
    try:
        partner, dtype = _pairing(replay, kv_heads, dim, limit)
    except _NotPairs as error:
        return NoRope(str(error), rotated=True)
    table = _table_graph(replay, kv_heads, partner)
    found = Rope(pre, layout, table, dtype, partner, f"{rotates[0]}{partner.tolist()}{kv_heads}")
    if known is not None:
        known[rotates] = found
    return found


def _layout(pre: fx.Node, key: fx.Node, kv_heads: int) -> tuple[int, int, int, int] | None:
    """Returns the axes of (B, Hkv, T, D) in `pre`, or None if it does not have them."""
    value = tensor_of(pre)
    if value is None or value.dim() != 4 or not value.is_floating_point():
        return None
    shape, (b, _, t, d) = tuple(value.shape), shape_of(key)
    axes: list[int] = []
    for size in (b, kv_heads, t, d):
        options = [i for i, s in enumerate(shape) if i not in axes and same_size(s, size)]
        if not options:
            return None
        axes.append(options[0])
    return axes[0], axes[1], axes[2], axes[3]


def _replay_graph(
    gm: fx.GraphModule, nodes: list[fx.Node], pre: fx.Node, layout: tuple[int, ...], key: fx.Node, position_ids: fx.Node
) -> tuple[torch.nn.Module, fx.Graph]:
    """Extracts the rotation as (x (B, Hkv, T, D), positions (B, T)) -> rotated x, same shape; returns its attributes
    and graph."""
    graph = fx.Graph()
    x, positions = graph.placeholder("x"), graph.placeholder("positions")
    batch = graph.call_function(aten.sym_size.int, (positions, 0))
    length = graph.call_function(aten.sym_size.int, (positions, 1))
    order = [0] * 4
    for axis_canonical, axis in enumerate(layout):
        order[axis] = axis_canonical
    env: dict[fx.Node, Any] = {pre: graph.call_function(aten.permute.default, (x, order)), position_ids: positions}
    value: Tensor = position_ids.meta["val"]
    root = torch.nn.Module()
    for node in nodes:
        if node in env or node.op == "placeholder":
            continue
        if is_size(node):
            # Any size that is the batch or the length now comes from x; arithmetic on sizes is copied.
            if same_size(node.meta["val"], value.shape[0]):
                env[node] = batch
                continue
            if same_size(node.meta["val"], value.shape[1]):
                env[node] = length
                continue
        if node.op == "get_attr":
            set_attr(root, str(node.target), get_attr(gm, str(node.target)))
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = {}
    graph.output(env[key])
    graph.lint()
    return root, graph


class _NotPairs(Exception):
    pass


def _pairing(replay: fx.GraphModule, kv_heads: int, dim: int, limit: int | None) -> tuple[Tensor, torch.dtype]:
    """Finds which channels the rotation pairs by rotating unit vectors at several positions; also cos' and sin's
    dtype."""
    replay = _on_cpu(replay)
    partner = torch.arange(dim)
    matrices = []
    limit = limit or 1 << 30
    for position in (p for p in (1, 2, 7, 100) if p < limit):
        units = torch.eye(dim).expand(1, kv_heads, dim, dim).contiguous()
        try:
            rotated = replay(units, torch.full((1, dim), position))
        except (RuntimeError, IndexError) as error:
            raise _NotPairs(f"the rotation could not be evaluated on its own ({str(error).splitlines()[0]})") from error
        matrices.append(rotated[0, 0].double().T)  # column i: the image of unit vector i
        if not torch.allclose(rotated, rotated[:, :1].expand_as(rotated), atol=1e-5):
            raise _NotPairs("the rotation differs between kv heads")
    for matrix in matrices:
        off = (matrix - torch.diag(torch.diagonal(matrix))).abs() > 1e-7
        if bool((off.sum(1) > 1).any()):
            raise _NotPairs("the rotation mixes more than two channels")
        rows = off.any(1)
        partner = torch.where(rows, off.to(torch.int8).argmax(1), partner)
    if not torch.equal(partner[partner], torch.arange(dim)):
        raise _NotPairs("the rotation's channels are not paired")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, kv_heads, 5, dim, generator=generator)
    positions = torch.tensor([[0, 1, 3, 50, 1000]]).clamp(max=limit - 1)
    try:
        cos, sin = _split(replay, kv_heads, partner, positions[0])
        rotated = replay(x, positions).float()
    except (RuntimeError, IndexError) as error:
        raise _NotPairs(f"the rotation could not be evaluated on its own ({str(error).splitlines()[0]})") from error
    dtype = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = cos.float(), sin.float()
    if not torch.allclose(rotated, x * cos + x[..., partner] * sin, atol=1e-3, rtol=1e-3):
        raise _NotPairs("the rotation is not linear in the key")
    return partner, dtype


def _split(replay: fx.GraphModule, kv_heads: int, partner: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (N, D) of `rotate` at `positions`, found by rotating the two halves of all pairs."""
    first = _halves(partner)
    x = torch.stack([first, 1 - first]).to(torch.float32)[:, None, None, :]
    x = x.expand(2, kv_heads, len(positions), -1).contiguous()
    rotated = replay(x, positions.expand(2, -1))[:, 0]
    cos = torch.where(first.bool(), rotated[0], rotated[1])
    alone = partner == torch.arange(len(partner))
    return cos, torch.where(alone, 0.0, torch.where(first.bool(), rotated[1], rotated[0]))


def _halves(partner: Tensor) -> Tensor:
    """Returns 1 for the first channel of each pair (and for unpaired channels), 0 for the second."""
    first = (partner >= torch.arange(len(partner))).to(torch.float32)
    return first


def _on_cpu(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns `gm` with its tensors and device arguments on the CPU, in fp32."""
    root = torch.nn.Module()
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        if node.op == "get_attr":
            value = get_attr(gm, str(node.target))
            if value.is_meta:
                raise _NotPairs(f"the table {node.target} has no values")
            set_attr(root, str(node.target), value.detach().cpu())
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
        node.args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in node.args)
    return fx.GraphModule(root, graph)


def _table_graph(replay: fx.GraphModule, kv_heads: int, partner: Tensor) -> fx.GraphModule:
    """Builds the graph positions (N,) -> (cos (N, D), sin (N, D)) by rotating the two halves of all pairs."""
    graph = fx.Graph()
    positions = graph.placeholder("positions")
    first = _halves(partner)
    alone = (partner == torch.arange(len(partner))).to(torch.float32)
    root = torch.nn.Module()
    for node in replay.graph.nodes:
        if node.op == "get_attr":
            set_attr(root, str(node.target), get_attr(replay, str(node.target)))
    dim = len(partner)
    root.register_buffer("rotary_halves", torch.stack([first, 1 - first]))
    root.register_buffer("rotary_first", first)
    root.register_buffer("rotary_paired", 1 - alone)
    halves = graph.get_attr("rotary_halves")
    length = graph.call_function(aten.sym_size.int, (positions, 0))
    x = graph.call_function(aten.reshape.default, (halves, [2, 1, 1, dim]))
    x = graph.call_function(aten.expand.default, (x, [2, kv_heads, length, dim]))
    rows = graph.call_function(
        aten.expand.default, (graph.call_function(aten.unsqueeze.default, (positions, 0)), [2, length])
    )
    rotated = graph.graph_copy(replay.graph, _bind(replay, x, rows))
    rotated = graph.call_function(aten.select.int, (rotated, 1, 0))
    a = graph.call_function(aten.select.int, (rotated, 0, 0))
    b = graph.call_function(aten.select.int, (rotated, 0, 1))
    mask = graph.get_attr("rotary_first")
    other = graph.call_function(aten.rsub.Scalar, (mask, 1))

    def mix(u: fx.Node, v: fx.Node) -> fx.Node:
        left = graph.call_function(aten.mul.Tensor, (u, mask))
        return graph.call_function(aten.add.Tensor, (left, graph.call_function(aten.mul.Tensor, (v, other))))

    sin = graph.call_function(aten.mul.Tensor, (mix(b, a), graph.get_attr("rotary_paired")))
    graph.output((mix(a, b), sin))
    graph.lint()
    return _LazyGraphModule(root, graph, class_name="RotaryTable")  # it is data for a program and never runs


def _bind(replay: fx.GraphModule, x: fx.Node, rows: fx.Node) -> dict[fx.Node, fx.Node]:
    inputs = [n for n in replay.graph.nodes if n.op == "placeholder"]
    return {inputs[0]: x, inputs[1]: rows}


def canonical_layout(graph: fx.Graph, node: fx.Node, layout: tuple[int, int, int, int]) -> fx.Node:
    """Permutes `node` to (B, Hkv, T, D)."""
    if layout == (0, 1, 2, 3):
        return node
    out = graph.call_function(aten.permute.default, (node, list(layout)))
    value = tensor_of(node)
    out.meta["val"] = value.permute(list(layout)) if value is not None else None
    return out
