"""Pinned spans: a copy of a program whose evictions keep what its cache says, whatever the policy's scores are.

Requires a program after `insert_cache`. Ensures that slots in the spans of the inputs `pin_begin_*` and `pin_end_*` come
before all others that the policy does not protect, and that no gate hides such tokens. What the policy computes and
remembers stays as it is: scores are replaced only where an eviction goes by them. A model has this copy besides its own
program, and caches without pinned spans never see it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import add_placeholder, arg, is_op, named_args, placeholder, set_args
from kvrewrite.ir.layout import pin_inputs
from kvrewrite.ir.program import Program

ops = torch.ops.kvrewrite
aten = torch.ops.aten
READERS = (ops.cached_attention.default,)
UPDATES = (ops.cache_update.default, ops.cache_update_quantized.default)


def insert_pins(program: Program) -> Program:
    """The copy. Parameters are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph.graph, {}))
    gm = fx.GraphModule(program.graph, graph, class_name="Pinned")
    specs = pin_inputs()
    like = placeholder(gm, "valid")
    assert like is not None
    nodes = [add_placeholder(gm, spec.name, like.meta.get("val")) for spec in specs]
    spans = nodes[: len(nodes) // 2], nodes[len(nodes) // 2 :]
    for node in list(graph.nodes):
        if is_op(node, *UPDATES):
            _pin_update(gm, node, spans)
        elif is_op(node, ops.kept_above.default):
            set_args(
                node, scores=_call(gm, node, ops.pin_scores.default, arg(node, "scores"), arg(node, "places"), *spans)
            )
        elif is_op(node, ops.share_layers.default):
            pairs = zip(arg(node, "scores"), arg(node, "places"), strict=True)
            pinned = [_call(gm, node, ops.pin_scores.default, *pair, *spans) for pair in pairs]
            set_args(node, scores=pinned)
    layout = dataclasses.replace(program.layout, inputs=[*program.layout.inputs, *specs])
    layout.attach(gm)
    graph.lint()
    gm.recompile()
    return dataclasses.replace(program, graph=gm, layout=layout)


def _call(gm: fx.GraphModule, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    with gm.graph.inserting_before(before):
        return gm.graph.call_function(target, args)


def _pin_update(gm: fx.GraphModule, node: fx.Node, spans: tuple[list[fx.Node], list[fx.Node]]) -> None:
    """An eviction goes by pinned scores, and a gate's flags leave pinned tokens alone."""
    args = named_args(node)
    by = args["select"]
    if by is None:
        cached = args["slot_scores"]
        if cached is None:
            cached = _call(gm, node, ops.read_pages.default, args["score_pages"], args["table"])
        by = _call(gm, node, aten.cat.default, [cached, args["new_scores"]], 2)
    slots = [args[name] for name in ("pos_pages", "table", "lens", "positions", "valid")]
    places = _call(gm, node, ops.slot_positions.default, *slots)
    set_args(node, select=_call(gm, node, ops.pin_scores.default, by, places, *spans))
    hidden = args["drop"]
    # Flags that attention does not read are no gate's: those of tokens that a policy reads once more never enter.
    if hidden is None or not any(is_op(user, *READERS) for user in hidden.users):
        return
    with gm.graph.inserting_after(hidden):
        shown = gm.graph.call_function(ops.unhide_pinned.default, (hidden, args["positions"], *spans))
    hidden.replace_all_uses_with(shown, delete_user_cb=lambda user: user is not shown)
