"""Lowering: puts fused ops in the place of several, on a copy of the program that a device runs.

Requires a graph behind `insert_cache`; ensures the same results up to rounding. Retaining heads are folded where they can be.
`lower_prefill` serves any number of tokens. `lower_decode` is for one token a row: attention with its mass comes from one op,
linears of the same input are one launch, and where ranks are frozen (`settled`) cached keys lie rotated in their pages, so
that nothing is rotated while decoding. The saved program stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from kvrewrite.graph import erase_dead, get_attr, is_op
from kvrewrite.passes.fold_heads import fold_heads
from kvrewrite.passes.fuse_linears import fuse_linears

ops = torch.ops.kvrewrite
aten = torch.ops.aten


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph once more, over the same parameters and buffers. Its code is generated if it is called: passes follow, and
    what runs in the end are parts of it (a third of the time of `compile` for 32 layers)."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return _LazyGraphModule(gm, graph)


def fold(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with folded retaining heads, from which both others are made."""
    folded = copy_of(gm)
    fold_heads(folded)
    return folded


def lower_prefill(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy for prompts."""
    lowered = copy_of(gm)
    _rank_all_layers(lowered)
    _fuse_reads(lowered)
    return _finished(lowered)


def lower_decode(gm: fx.GraphModule, settled: bool) -> fx.GraphModule:
    """A copy for single tokens."""
    lowered = copy_of(gm)
    if settled:
        _use_settled_keys(lowered)
    else:
        _fuse_reads(lowered)
    _fuse_mass(lowered)
    fuse_linears(lowered, singles=True)
    return _finished(lowered)


def _finished(gm: fx.GraphModule) -> fx.GraphModule:
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_op(n, target)]


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Another call in a node's place, with its metadata."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _lens_of(gm: fx.GraphModule) -> dict[Any, Any]:
    """The live lengths that go with each page table."""
    return {n.args[7]: n.args[8] for n in _calls(gm, ops.cached_attention.default)}


def _fuse_reads(gm: fx.GraphModule) -> None:
    """Cached keys are read and rotated in one pass."""
    lens = _lens_of(gm)
    for node in _calls(gm, ops.rotate.default):
        read, cos, sin, positions, partner = node.args
        if is_op(read, ops.read_pages.default):
            pool, table = read.args  # type: ignore[union-attr]
            half = _half_split(get_attr(gm, str(partner.target)))  # type: ignore[union-attr]
            _replace(node, ops.read_rotated.default, (pool, table, lens[table], cos, sin, positions, partner, half))


def _half_split(partner: torch.Tensor) -> int:
    """h where the partners of channels 0..h-1 are h..2h-1 and the rest has none, as in most models; else 0."""
    d = partner.numel()
    channel = torch.arange(d, device=partner.device)
    h = int(partner[0]) if d else 0
    if h < 1 or 2 * h > d:
        return 0
    expected = torch.cat([channel[h : 2 * h], channel[:h], channel[2 * h :]])
    return h if torch.equal(partner.to(channel.dtype), expected) else 0


def _rank_all_layers(gm: fx.GraphModule) -> None:
    """Ranks of all layers at once, in front of everything: they depend on what earlier steps have kept only."""
    by_pool: dict[Any, list[fx.Node]] = {}
    for node in _calls(gm, ops.slot_rotary.default):
        by_pool.setdefault(node.args[0], []).append(node)
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for pool, nodes in by_pool.items():
        tables = [n.args[1] for n in nodes]
        lens = [n.args[2] for n in nodes]
        rest = nodes[0].args[3:]
        layers = [t.args[2] for t in tables]  # type: ignore[union-attr]
        if layers != list(range(len(layers))) or any(n.args[3:] != rest for n in nodes):
            continue
        with gm.graph.inserting_before(first):
            whole = (tables[0].args[0], lens[0].args[0])  # type: ignore[union-attr]
            ranks = gm.graph.call_function(ops.slot_rotary_layers.default, (pool, *whole, len(layers), *rest))
            each = gm.graph.call_function(aten.unbind.int, (ranks, 0))
            picked = [gm.graph.call_function(operator.getitem, (each, i)) for i in range(len(layers))]
        for node, pick in zip(nodes, picked):
            node.replace_all_uses_with(pick)
            gm.graph.erase_node(node)


def _use_settled_keys(gm: fx.GraphModule) -> None:
    """Attention reads the pages as they are, and the newcomer's key is cached rotated, too."""
    rotated: dict[Any, Any] = {}
    for node in _calls(gm, ops.cached_attention.default):
        if is_op(node.args[3], ops.rotate.default):
            rotated.setdefault(node.args[7], node.args[1])
            node.update_arg(3, None)
    for node in _calls(gm, ops.cache_update.default):
        if node.args[13] in rotated:
            node.update_arg(0, rotated[node.args[13]])
    # What ranks the slots would write to the cache.
    for node in _calls(gm, ops.rotate.default):
        gm.graph.erase_node(node)
    for node in _calls(gm, ops.slot_rotary.default):
        gm.graph.erase_node(node)


def _fuse_mass(gm: fx.GraphModule) -> None:
    """One token's attention, and from the same pass the mass that `observe` would compute anew."""
    for node in _calls(gm, ops.cached_attention.default):
        (q, k, v, k_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, sinks, alibi, hidden, *shape) = (
            node.args
        )
        if hidden is not None:
            continue
        v_dense = shape[4] if len(shape) > 4 else None
        logs = [n for n in node.users if is_op(n, operator.getitem) and n.args[1] == 1]
        watchers = [n for lse in logs for n in lse.users if _same_rows(n, q, lse)]
        pools = (k_pages, v_pages, pos_pages)
        rest = (table, lens, positions, valid, sinks, alibi, *shape[:4])
        new = _replace(node, ops.decode_attention.default, (q, k, v, k_dense, v_dense, *pools, *rest, bool(watchers)))
        for watcher in watchers:
            with gm.graph.inserting_before(watcher):
                mass = gm.graph.call_function(operator.getitem, (new, 2))
                weight = gm.graph.call_function(aten.unsqueeze.default, (watcher.args[3], 1))
                weighted = gm.graph.call_function(aten.mul.Tensor, (mass, weight))
            watcher.replace_all_uses_with(weighted)
            gm.graph.erase_node(watcher)


def _same_rows(node: fx.Node, q: Any, lse: Any) -> bool:
    """Whether `observe` sums weights, not flags, of these queries."""
    if not is_op(node, ops.observe.default) or node.args[0] is not q or node.args[2] is not lse:
        return False
    above = node.args[17] if len(node.args) > 17 else None
    return above is None and node.args[12] is None
