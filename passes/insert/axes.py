"""Positions of several axes as an input: a copy of a program whose rotation takes `rope_positions` (B, T, 3).

Requires a program whose rotation gives all axes the same positions, those of text (kvrewrite/ir/axes.py), and rotates keys before
they are cached. Ensures that each axis has its own. What the cache knows of positions stays the tokens' index.
"""

from __future__ import annotations

import torch
from torch import fx

from kvrewrite.errors import InputError
from kvrewrite.ir.axes import AXES, axes_node
from kvrewrite.ir.fx import placeholder, shape_of
from kvrewrite.ir.layout import InputSpec
from kvrewrite.ir.program import Program
from kvrewrite.passes.canonical.canonicalize import add_call
from kvrewrite.passes.insert.embeds import with_input

NAME = "rope_positions"
aten = torch.ops.aten


def insert_axes(program: Program) -> Program:
    """The copy. Parameters are shared. Raises InputError where there is none."""
    if program.layout.contiguous or program.layout.rotary:
        raise InputError(
            f"{NAME} (images of a model with M-RoPE) are not supported with the policy {program.policy['name']} and its options: "
            "it turns keys itself, by one position. Use positions=original and a policy that leaves rotations alone (h2o, snapkv)"
        )
    if axes_node(program.graph) is None:
        raise InputError(f"{NAME} is not supported by this rewritten model: its rotation has one axis. Leave it out")
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph.graph, {}))
    gm = fx.GraphModule(program.graph, graph, class_name="Placed")
    old, one = axes_node(gm), placeholder(gm, "position_ids")
    assert old is not None and one is not None
    spec = InputSpec(NAME, NAME, "tokens", torch.int64, ("B", "T", AXES))
    with graph.inserting_after(one):
        given = graph.placeholder(NAME)
    like = one.meta["val"]
    given.meta = {"val": like.new_empty((*like.shape, AXES))}
    with graph.inserting_before(old):
        new = add_call(gm, aten.permute.default, given, [2, 0, 1])
        if shape_of(old)[0] != AXES:
            new = add_call(gm, aten.cat.default, [add_call(gm, aten.unsqueeze.default, one, 0), new])
    old.replace_all_uses_with(new)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op == "placeholder" or n.is_impure())
    return with_input(program, gm, spec, after="position_ids")
