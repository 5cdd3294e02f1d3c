"""Pickling of rewritten models (`torch.save`, worker processes): the graph goes as the data that a model directory has, too.

`fx.GraphModule` pickles its code and traces that again to load it, which fails where a graph's sizes depend on its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.ir.layout_file import layout_to_dict, read_layout
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import graph_from_dict, graph_to_dict


def program_state(program: Program) -> dict[str, Any]:
    """A program without its graph module: plain data and tensors. Raises ArtifactError where the graph can't be written."""
    if program.layout.devices is not None:
        raise ArtifactError(
            "a model on several devices can't be pickled: transfers between them are part of its graph. Load it on one device"
        )
    if program.parallel is not None:
        raise ArtifactError(
            "one process's part of a model can't be pickled, as the others would not know of it; load it in each process"
        )
    names = [*program.base, *program.policy_weights, *program.constants]
    read = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    tensors: dict[str, Tensor] = {
        name: get_attr(program.graph, name) for name in dict.fromkeys([*names, *sorted(read)])
    }
    fields = {name: value for name, value in vars(program).items() if name not in ("graph", "layout")}
    plain = {"graph": graph_to_dict(program.graph), "layout": layout_to_dict(program.layout, program.graph)}
    return {"fields": fields, **plain, "tensors": tensors}


def program_of(state: dict[str, Any]) -> Program:
    """The inverse of `program_state`."""
    tensors: dict[str, Tensor] = state["tensors"]
    graph = graph_from_dict(state["graph"], tensors)
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name in tensors.keys() - read:  # tables that the runtime reads and no node does
        set_attr(graph, name, tensors[name])
    dtype = getattr(torch, state["fields"]["dtype"])
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    layout = read_layout(state["layout"], graph, dtype, device, "the pickled model")
    return Program(graph=graph, layout=layout, **state["fields"])


def model_of(cls: type[Any], program: dict[str, Any], rest: dict[str, Any]) -> Any:
    """A model from what `RewrittenModel.__reduce_ex__` keeps."""
    training = rest.pop("training")
    return cls(program_of(program), **rest).train(training)
