"""Lowering for prompts: fused ops take the place of several, on a copy of the program that a device runs.

Requires a graph after `insert_cache`; ensures the same results up to rounding. `fold` folds retaining heads where they can be,
for this and for decoding. `lower_prefill` serves any number of tokens, and `without_logits` of it those of a prompt that nobody
wants logits of. The saved program stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import (
    ancestors,
    arg,
    erase_dead,
    get_attr,
    is_op,
    is_size,
    mutates,
    named_args,
    op_args,
    output_node,
    same_size,
    tensor_of,
)
from kvrewrite.ir.layout import spec_of
from kvrewrite.ops.linear import chunk_kernel_suits
from kvrewrite.passes.lower.fold_heads import fold_heads
from kvrewrite.passes.lower.fuse_linears import fuse_gates
from kvrewrite.passes.lower.match import cache_of, calls, copy_of, half_split, lowered, replace, rotation, view_of

ops = torch.ops.kvrewrite
aten = torch.ops.aten
# What `attend_and_update` calls those arguments of attention whose names both of its halves have.
_OF_ATTENTION = {"sinks": "attention_sinks", "window": "visible_window", "chunk": "visible_chunk"}
_OF_UPDATE = {"k": "new_k", "v": "new_v"}
_SHARING = ("floor", "spare", "next_table", "threshold")  # of `cache_update`: heads share budgets, or slots are merged


def fold(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with folded retaining heads, from which both others are made."""
    return lowered(gm, "", [fold_heads])


def lower_prefill(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy for prompts."""
    steps = [_rank_all_layers, fuse_reads, _rotate_both, _overlap, _fuse_gates, erase_dead]
    return lowered(gm, "prefill_", steps)


def without_logits(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a program, or of its last part, that writes to the caches and returns nothing. What only the logits need is gone:
    most often all of the last layer but its keys, values and their scores."""
    silent = copy_of(gm)
    output_node(silent).args = ((),)
    erase_dead(silent)
    for node in reversed(calls(silent, ops.attend_and_update.default)):
        if not node.users:
            both, update = named_args(node), ops.cache_update.default
            own = {a.name: both.get(_OF_UPDATE.get(a.name, a.name)) for a in update._schema.arguments}
            replace(node, update, op_args(update, **own))
            erase_dead(silent)
    silent.graph.lint()
    silent.recompile()
    return silent


def shares_or_merges(update: fx.Node) -> bool:
    """Whether heads share budgets, or slots are merged, in a `cache_update`: the fused updates do neither."""
    return any(arg(update, name) is not None for name in _SHARING)


def fuse_reads(gm: fx.GraphModule) -> None:
    """Cached keys are read and rotated in one pass."""
    lens = {arg(n, "table"): arg(n, "lens") for n in calls(gm, ops.cached_attention.default)}
    fused = ops.read_rotated.default
    for node in calls(gm, ops.rotate.default):
        rotate = named_args(node)
        read, partner = rotate.pop("x"), rotate["partner"]
        if is_op(read, ops.read_pages.default):
            table, half = arg(read, "table"), half_split(get_attr(gm, str(partner.target)))
            pages = {"k_pages": arg(read, "pool"), "table": table, "lens": lens[table]}
            replace(node, fused, op_args(fused, **pages, **rotate, half=half))


def _fuse_gates(gm: fx.GraphModule) -> None:
    fuse_gates(gm, chunk_kernel_suits)


def _rank_all_layers(gm: fx.GraphModule) -> None:
    """Ranks of all layers at once, before everything: they depend on what earlier steps have kept only."""
    by_pool: dict[Any, list[fx.Node]] = {}
    for node in calls(gm, ops.slot_rotary.default):
        by_pool.setdefault(arg(node, "pos_pages"), []).append(node)
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    fused = ops.slot_rotary_layers.default
    for nodes in by_pool.values():
        tables = [view_of(arg(n, "table")) for n in nodes]
        each = [{k: v for k, v in named_args(n).items() if k not in ("table", "lens")} for n in nodes]
        layers = len(nodes)
        if [layer for _, layer in tables] != list(range(layers)) or any(rest != each[0] for rest in each):
            continue
        whole = {"tables": tables[0][0], "lens": view_of(arg(nodes[0], "lens"))[0], "layers": layers}
        with gm.graph.inserting_before(first):
            ranks = gm.graph.call_function(fused, op_args(fused, **whole, **each[0]))
            unbound = gm.graph.call_function(aten.unbind.int, (ranks, 0))
            picked = [gm.graph.call_function(operator.getitem, (unbound, i)) for i in range(layers)]
        for node, pick in zip(nodes, picked):
            node.replace_all_uses_with(pick)
            gm.graph.erase_node(node)


def _rotate_both(gm: fx.GraphModule) -> None:
    """RoPE of the new tokens' queries and keys in one pass."""
    order: dict[fx.Node, float] = {node: i for i, node in enumerate(gm.graph.nodes)}
    done: set[fx.Node] = set()
    for node in calls(gm, ops.cached_attention.default):
        q, k = arg(node, "q"), arg(node, "k")
        found_q, found_k = rotation(q), rotation(k)
        if found_q is None or found_k is None or found_q[1:] != found_k[1:] or {q, k} & done:
            continue
        tokens = [tensor_of(x).shape[axis] for x, axis in ((found_q[0], 2), (found_q[1], 1), (found_q[2], 1))]  # type: ignore[union-attr]
        for old, x in ((q, found_q[0]), (k, found_k[0])):
            for user in list(old.users):
                if is_op(user, aten.sym_size.int):
                    user.replace_input_with(old, x)
        first = min([*q.users, *k.users], key=lambda n: order[n])
        if not all(same_size(tokens[0], n) for n in tokens) or order[first] < max(order[q], order[k]):
            continue
        done |= {q, k}
        with gm.graph.inserting_before(first):
            both = gm.graph.call_function(ops.turn_both.default, (found_q[0], found_k[0], *found_q[1:]))
            picked = [gm.graph.call_function(operator.getitem, (both, i)) for i in range(2)]
        for old, new in zip((q, k), picked):
            order[new] = order[first] - 0.5
            new.meta.update(old.meta)
            old.replace_all_uses_with(new)


def _overlap(gm: fx.GraphModule) -> None:
    """Attention and the update after it in one op that runs both at the same time, where the update needs nothing of what
    attention computes and nobody else reads the cache between them. What makes its scores moves before them."""
    by_cache: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for lens in {n for n in node.all_input_nodes if _is_lens(n)}:
            if not is_op(node, aten.sym_size.int):
                by_cache.setdefault(cache_of(lens), []).append(node)
    fused = ops.attend_and_update.default
    for users in by_cache.values():
        if len(users) < 2:
            continue
        attend, update = users[-2:]
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        if not is_op(attend, ops.cached_attention.default) or not is_op(update, ops.cache_update.default):
            continue
        attention, own = named_args(attend), named_args(update)
        if attention.pop("patterns"):  # attention is short then, and has no op with an update
            continue
        shared = ("positions", "valid", "k_pages", "v_pages", "pos_pages", "table", "lens")
        if any(attention[name] != own[name] for name in shared) or shares_or_merges(update):
            continue
        late = [n for n in ancestors(update.all_input_nodes) if order[n] > order[attend]]
        pure = all(n.op == "get_attr" or is_size(n) or _is_aten(n) for n in late)
        between = [n for n in own["table"].users if order[attend] < order[n] < order[update]]
        if attend in ancestors(late) or not pure or not all(map(is_size, between)):
            continue
        for node in sorted(late, key=lambda n: order[n]):
            attend.prepend(node)
        both = {_OF_ATTENTION.get(name, name): value for name, value in attention.items()}
        both |= {_OF_UPDATE.get(name, name): value for name, value in own.items() if name not in _SHARING}
        replace(attend, fused, op_args(fused, **both))
        gm.graph.erase_node(update)


def _is_aten(node: fx.Node) -> bool:
    """Whether a node calls an op of torch's own that writes to nothing. None of them reads a cache."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten" and not mutates(node)


def _is_lens(node: fx.Node) -> bool:
    """Whether a node is the live lengths of one layer's cache."""
    source = node.args[0] if is_op(node, aten.select.int) else node
    spec = spec_of(source)
    return spec is not None and spec.part == "lens"
