"""Embeddings in the place of token ids: a copy of a program that begins where ids have become embeddings.

Requires a program whose `embedded` names the node that the model's embedding module returns (capture/flatten.py marks it).
Ensures that the copy reads `inputs_embeds` (B, T, D) there and no id anywhere: of `input_ids` only the shape is left. A model
that reads ids elsewhere, too (embeddings of each layer), or whose policy does, has no such copy. A model has it besides its
own program, and calls with ids never see it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from kvrewrite.capture.captured import EMBEDDED
from kvrewrite.errors import InputError
from kvrewrite.ir.fx import SIZE_OPS, ancestors, is_op, module_path, placeholder, shape_of, tensor_of
from kvrewrite.ir.layout import InputSpec
from kvrewrite.ir.program import Program
from kvrewrite.passes.insert.devices import DEVICE

NAME = "inputs_embeds"


def embedded_node(gm: fx.GraphModule) -> str:
    """The name of the last node that makes embeddings of ids, "" where there is none."""
    found = [node for node in gm.graph.nodes if node.meta.get(EMBEDDED)]
    return found[-1].name if found else ""


def _cut(program: Program) -> fx.Node:
    """The node that embeddings stand for. Raises InputError with the reason where there is none."""
    found = next((n for n in program.graph.graph.nodes if n.name == program.embedded), None)
    value = tensor_of(found)
    if found is None or value is None or value.dim() != 3:
        raise _refusal(
            "its graph does not look tokens up in a table; or its directory was written before directories said where that "
            "is, then convert the model again"
        )
    if program.parallel is not None:
        raise _refusal("its table is dealt out over processes; use it without tp_plan")
    devices = program.layout.devices
    if devices is not None and found.meta.get(DEVICE, devices.inputs) != devices.inputs:
        raise _refusal(f"its table lies on {found.meta[DEVICE]} and its inputs on {devices.inputs}")
    return found


def _refusal(reason: str) -> InputError:
    return InputError(f"{NAME} is not supported by this rewritten model: {reason}. Pass input_ids")


def insert_embeds(program: Program) -> Program:
    """The copy. Parameters are shared. Raises InputError where ids are needed beside their embeddings."""
    name = _cut(program).name
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph.graph, {}))
    gm = fx.GraphModule(program.graph, graph, class_name="Embedded")
    cut = next(n for n in graph.nodes if n.name == name)
    ids = placeholder(gm, "input_ids")
    assert ids is not None
    with graph.inserting_after(ids):
        given = graph.placeholder(NAME)
    given.meta = {"val": cut.meta["val"]}
    cut.replace_all_uses_with(given)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op == "placeholder" or n.is_impure())
    if readers := [user for user in ids.users if not is_op(user, *SIZE_OPS)]:
        where = module_path(readers[0]) or str(readers[0].target)
        raise _refusal(f"it, or its policy {program.policy['name']}, reads token ids beside their embeddings ({where})")
    width = shape_of(given)[2]
    spec = InputSpec(NAME, NAME, "tokens", given.meta["val"].dtype, ("B", "T", int(width)))
    return with_input(program, gm, spec, after="input_ids")


def with_input(program: Program, gm: fx.GraphModule, spec: InputSpec, after: str) -> Program:
    """The program with `gm` as its graph, which has one more input after the input of that name."""
    at = program.layout.input_names.index(after) + 1
    inputs = [*program.layout.inputs[:at], spec, *program.layout.inputs[at:]]
    layout = dataclasses.replace(program.layout, inputs=inputs)
    layout.attach(gm)
    gm.graph.lint()
    gm.recompile()
    return dataclasses.replace(program, graph=gm, layout=layout)


def embedding_graph(program: Program) -> fx.GraphModule:
    """What makes embeddings (B, T, D) of ids (B, T), as a graph of its own; parameters are shared."""
    cut = _cut(program)
    needed = ancestors([cut])
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        if node in needed or (node.op == "placeholder" and node.target == "input_ids"):
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(env[cut])
    return fx.GraphModule(program.graph, graph, class_name="TokenEmbeddings")


def embedding_form(program: Program) -> tuple[int, torch.dtype]:
    """D and the dtype of the embeddings that the program takes."""
    value = _cut(program).meta["val"]
    return int(value.shape[2]), value.dtype
