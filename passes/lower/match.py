"""What the lowering passes share: copies of a graph, calls and their replacement, and what they recognize in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from kvrewrite.ir.fx import get_attr, is_op, mutates, same_size, tensor_of
from kvrewrite.ir.pass_log import PassLog
from kvrewrite.passes.lower.fuse_linears import activation_of

aten = torch.ops.aten
END = 2**63 - 1  # where a slice of everything ends


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph once more, over the same parameters and buffers. Its code is generated if it is called: passes follow, and
    what runs in the end are parts of it (a third of the time of `compile` for 32 layers)."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return _LazyGraphModule(gm, graph)


def lowered(gm: fx.GraphModule, what: str, steps: Sequence[Callable[[fx.GraphModule], Any]]) -> fx.GraphModule:
    """A copy after these passes, each of which is logged by its name, with `what` before it."""
    copy, passes = copy_of(gm), PassLog()
    for step in steps:
        step(copy)
        passes.done(what + step.__name__.removeprefix("_"), copy)
    copy.graph.lint()
    copy.recompile()
    return copy


def calls(gm: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    """The calls of these ops, in order."""
    return [n for n in gm.graph.nodes if is_op(n, *targets)]


def replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Another call in a node's place, with its metadata."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def view_of(view: Any) -> tuple[fx.Node, int]:
    """The graph input of a cache class, and the layer in it, that a node is the view of."""
    source, _, layer = view.args
    return source, int(layer)


def cache_of(lens: Any) -> Any:
    """What tells the cache of one layer from others, of its lens."""
    return view_of(lens) if is_op(lens, aten.select.int) else lens


def written_before(node: fx.Node) -> set[Any]:
    """The caches that have been written to in this step before a node. Where that is not the one that it reads, there are
    launches between that write and the node: at least those that make its queries."""
    written: set[Any] = set()
    for other in node.graph.nodes:
        if other is node:
            break
        if mutates(other):
            written.update(cache_of(n) for n in other.all_input_nodes)
    return written


def half_split(partner: torch.Tensor) -> int:
    """h where the partners of channels 0..h-1 are h..2h-1 and the rest has none, as in most models; else 0."""
    d = partner.numel()
    channel = torch.arange(d, device=partner.device)
    h = int(partner[0]) if d else 0
    if h < 1 or 2 * h > d:
        return 0
    expected = torch.cat([channel[h : 2 * h], channel[:h], channel[2 * h :]])
    return h if torch.equal(partner.to(channel.dtype), expected) else 0


def rotation(node: Any) -> tuple[Any, Any, Any] | None:
    """(x, cos, sin) where `node` is x * cos + cat([-x2, x1]) * sin of the halves x1, x2 of x, cos and sin (B, 1, D)."""
    if len(node.args) != 2 or node.kwargs:
        return None
    straight, crossed = node.args
    if not is_op(straight, aten.mul.Tensor) or not is_op(crossed, aten.mul.Tensor):
        return None
    (x, cos), (swapped, sin) = straight.args, crossed.args
    if not is_op(swapped, aten.cat.default) or swapped.args[1:] not in ((-1,), (3,)) or len(swapped.args[0]) != 2:
        return None
    negated, low = swapped.args[0]
    if not is_op(negated, aten.neg.default):
        return None
    high = negated.args[0]
    value = tensor_of(x)
    if value is None or value.dim() != 4 or not isinstance(value.shape[3], int) or value.shape[3] % 2:
        return None
    half = value.shape[3] // 2
    for part, bounds in ((low, (0, half)), (high, (half, END))):
        if not is_op(part, aten.slice.Tensor) or part.args[0] is not x or tuple(part.args[1:]) != (3, *bounds):
            return None
    found = []
    for table in (cos, sin):
        if not is_op(table, aten.unsqueeze.default) or table.args[1] != 1:
            return None
        row = table.args[0]
        have = tensor_of(row)
        if have is None or have.dim() != 3 or have.dtype != value.dtype or have.shape[2] != value.shape[3]:
            return None
        if not same_size(have.shape[0], value.shape[0]):
            return None
        found.append(row)
    return x, found[0], found[1]


def retaining_head(gm: fx.GraphModule, scores: Any) -> tuple[Any, Any, str] | None:
    """(hidden, head, activation) where scores are to(act(hidden) head^T), transposed, in fp32."""
    if is_op(scores, aten.to.dtype) and scores.args[1] == torch.float32:
        scores = scores.args[0]
    if not is_op(scores, aten.transpose.int) or tuple(scores.args[1:]) != (1, 2):
        return None
    second = scores.args[0]
    if not is_op(second, aten.linear.default) or len(second.args) != 2:
        return None
    active, head = second.args
    name = activation_of(active)
    if name is None or head.op != "get_attr" or not get_attr(gm, str(head.target)).is_contiguous():
        return None
    return active.args[0], head, name
