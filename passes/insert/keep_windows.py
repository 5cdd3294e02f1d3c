"""Windows that take nothing: a copy of a program whose layers with a window keep what no later token sees, for tokens that may
be taken back.

Requires a program after `insert_cache` whose slots are not quantized. Ensures the same logits: attention hides what lies
outside a window, whether it is held or not. A model has this copy besides its own program, for caches that only append.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from kvrewrite.ir.fx import is_op, set_args
from kvrewrite.ir.program import Program

ops = torch.ops.kvrewrite


def keep_windows(program: Program) -> Program:
    """The copy. Parameters are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph.graph, {}))
    gm = fx.GraphModule(program.graph, graph, class_name="KeepingWindows")
    for node in graph.nodes:
        if is_op(node, ops.cache_update.default):
            set_args(node, window=0, chunk=0)
    program.layout.attach(gm)
    graph.lint()
    gm.recompile()
    return dataclasses.replace(program, graph=gm)
