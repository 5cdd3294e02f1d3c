"""Cuts a rewritten program at its attention sites, so that what repeats from layer to layer is compiled once.

Requires a graph after `insert_cache`. A part begins where a site first reads its cache and ends before the next one:
attention, the eviction after it, the rest of the layer and the projections of the next. Before them comes a prologue,
and the last part has the logits. Parts have no parameters of their own: those are inputs, as are views of the caches,
so that layers that compute the same have graphs with the same fingerprint and share one `GraphModule`. Nodes keep their
order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from kvrewrite.ir.fx import SIZE_OPS, arg, fingerprint, is_op, is_size, output_node, tensor_of
from kvrewrite.ir.layout import InputSpec, spec_of
from kvrewrite.ir.pass_log import PassLog
from kvrewrite.passes.lower.prompt import without_logits

ops = torch.ops.kvrewrite
aten = torch.ops.aten


@dataclass
class Part:
    """One stretch of a program. inputs, outputs: names of values; outputs are made here and read by later parts.
    moving: for each input the dimensions whose size may differ between calls."""

    graph: fx.GraphModule
    inputs: list[str]
    outputs: list[str]
    moving: list[tuple[int, ...]]
    last_use: list[str] = field(default_factory=list)  # values that nothing needs after this part


@dataclass
class Partition:
    """A program in parts. inputs: those of the graph by name. views: name of a view -> (graph input, layer),
    `input[layer]`. attributes: names of parameters and buffers that parts read. result: the name of the logits, or None
    where nobody wants them."""

    parts: list[Part]
    inputs: dict[str, InputSpec]
    views: dict[str, tuple[str, int]]
    attributes: list[str]
    result: str | None

    @property
    def distinct(self) -> list[fx.GraphModule]:
        """The graphs that differ, in order."""
        return list(dict.fromkeys(p.graph for p in self.parts))

    @property
    def sources(self) -> set[str]:
        """The graph inputs that parts read, themselves or one layer's view of them."""
        read = {name for part in self.parts for name in part.inputs}
        return {self.views[name][0] if name in self.views else name for name in read}


def partition(gm: fx.GraphModule, rows_move: bool = True) -> Partition:
    """Cuts a copy of the graph; `gm` stays as it is and keeps the parameters. rows_move: whether the numbers of rows
    and tokens may differ from call to call; those of pages may."""
    passes = PassLog()
    views: dict[str, tuple[str, int]] = {}
    homes: dict[fx.Node, int] = {}  # node -> its part
    part, attended = 0, True
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or _is_size_node(node):
            continue
        if _is_view(node):
            views[node.name] = (str(node.args[0].target), int(node.args[2]))
            continue
        if attended and _reads_cache(node):
            part, attended = part + 1, False
        homes[node] = part
        attended |= _attends(node)
    result = output_node(gm).args[0]
    assert isinstance(result, fx.Node) and result in homes
    members: list[list[fx.Node]] = [[] for _ in range(part + 1)]
    for node, home in homes.items():
        members[home].append(node)
    needed = _needed_later(homes, result)
    made: dict[str, fx.GraphModule] = {}
    parts = []
    for nodes in members:
        outputs = [n for n in nodes if n in needed]
        graph, inputs = _extract(nodes, outputs)
        text = fingerprint(graph)
        if text not in made:
            made[text] = fx.GraphModule({}, graph)
        moving = [_moving(n, rows_move) for n in inputs]
        parts.append(Part(made[text], [_name(n) for n in inputs], [n.name for n in outputs], moving))
    _note_last_uses(parts, result.name)
    attributes = sorted({str(n.target) for n in gm.graph.nodes if n.op == "get_attr"})
    passes.parts("partition", len(parts), list(made.values()))
    specs = {spec.name: spec for node in gm.graph.find_nodes(op="placeholder") if (spec := spec_of(node)) is not None}
    return Partition(parts, specs, views, attributes, result.name)


def without_result(whole: Partition) -> Partition:
    """The same program, but for what its last part computes for the logits alone: most often all but the update of the
    last cache. Other parts are the same graphs, so that there is little more to compile."""
    last = whole.parts[-1]
    graph = fx.GraphModule({}, without_logits(last.graph).graph)
    inputs, moving = [], []
    for node, name, dims in zip(graph.graph.find_nodes(op="placeholder"), last.inputs, last.moving):
        if node.users:
            inputs.append(name)
            moving.append(dims)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    parts = [replace(part, last_use=[]) for part in whole.parts[:-1]] + [Part(graph, inputs, [], moving)]
    _note_last_uses(parts, None)
    return replace(whole, parts=parts, result=None)


def _is_size_node(node: fx.Node) -> bool:
    """Sizes are computed again in each part that needs them, from tensors: an int between parts would be a constant to
    it."""
    return node.op == "call_function" and (node.target in SIZE_OPS or is_size(node))


def _is_view(node: fx.Node) -> bool:
    """One layer's view of a cache input."""
    if not is_op(node, aten.select.int):
        return False
    source, dim, index = node.args
    return isinstance(source, fx.Node) and source.op == "placeholder" and (dim, type(index)) == (0, int)


def _reads_cache(node: fx.Node) -> bool:
    """Whether a part may begin here: at a site's first look at cached keys. (Stored scores are read after
    attention.)"""
    if is_op(node, ops.read_pages.default):
        pool = arg(node, "pool")
        spec = spec_of(pool)
        return spec is not None and spec.part == "k_pages"
    reads = is_op(node, ops.slot_rotary.default, ops.read_quantized.default, ops.read_rotated.default)
    return reads or _attends(node)


def _attends(node: fx.Node) -> bool:
    """Whether this is a site's attention."""
    return is_op(
        node,
        ops.cached_attention.default,
        ops.latent_attention.default,
        ops.attend_and_update.default,
        ops.decode_attention.default,
        ops.decode_attention_quantized.default,
    )


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op in ("placeholder", "get_attr") else node.name


def _needed_later(homes: dict[fx.Node, int], result: fx.Node) -> set[fx.Node]:
    """Values that leave the part that makes them."""
    needed = {result}
    for node, home in homes.items():
        for source in _sources(node):
            if homes.get(source, home) != home:
                needed.add(source)
    return needed


def _sources(node: fx.Node) -> set[fx.Node]:
    """The tensors that a node reads, itself or for their sizes."""
    found: set[fx.Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        source = todo.pop()
        if _is_size_node(source):
            todo.extend(source.all_input_nodes)
        else:
            found.add(source)
    return found


def _extract(nodes: list[fx.Node], outputs: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of its own of `nodes`, and the nodes that its placeholders stand for, in order of first use."""
    graph = fx.Graph()
    own = set(nodes)
    inputs: list[fx.Node] = []
    first: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> None:
        if node not in own and node not in first:
            first[node] = graph.placeholder(f"x{len(first)}")
            inputs.append(node)

    # Placeholders come first in a graph, so they are found before anything is copied.
    for node in nodes:
        for source in _ordered_sources(node):
            find(source)
    env = dict(first)

    def copy(node: fx.Node) -> fx.Node:
        if node not in env:
            assert _is_size_node(node)
            env[node] = graph.node_copy(node, copy)
        return env[node]

    for node in nodes:
        for source in node.all_input_nodes:
            copy(source)
        env[node] = graph.node_copy(node, copy)
    graph.output(tuple(env[n] for n in outputs))
    graph.lint()
    return graph, inputs


def _ordered_sources(node: fx.Node) -> list[fx.Node]:
    """`_sources` in the order of the arguments."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        found.extend(_ordered_sources(source) if _is_size_node(source) else [source])
    return found


def _moving(node: fx.Node, rows_move: bool) -> tuple[int, ...]:
    """The dimensions of an input that are no constants."""
    view = _is_view(node)
    spec = spec_of(node.args[0] if view else node)
    if spec is not None:
        dims = spec.moving if rows_move else spec.moving_while_decoding
        return tuple(d - 1 for d in dims) if view else dims
    value = tensor_of(node) if rows_move and node.op == "call_function" else None
    shape = () if value is None else value.shape
    return tuple(d for d, size in enumerate(shape) if isinstance(size, torch.SymInt))


def _note_last_uses(parts: list[Part], result: str | None) -> None:
    """Says after which part each value can be freed."""
    seen = {result}
    for part in reversed(parts):
        for name in [*part.inputs, *part.outputs]:
            if name not in seen:
                seen.add(name)
                part.last_use.append(name)
