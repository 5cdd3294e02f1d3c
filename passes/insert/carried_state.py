"""State of layers without attention, beside the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from kvrewrite.ir.fx import named_args, op_args, shape_of, tensor_of
from kvrewrite.ir.layout import State

ops = torch.ops.kvrewrite


def carry_states(gm: fx.GraphModule, valid: fx.Node, add_state: Callable[[State], fx.Node]) -> None:
    """What layers carry besides keys and values becomes state beside the cache."""
    counts = {"past": 0, "scan": 0, "sum": 0}
    for node in list(gm.graph.nodes):
        if node.target is ops.with_past.default:
            args = named_args(node)
            x, count, dim = args["x"], args["count"], args["dim"]
            shape = list(shape_of(x))
            shape[dim] = count
            value = tensor_of(x)
            assert value is not None
            kind, dtype = "past", value.dtype
        elif node.target is ops.linear_scan.default:
            args = named_args(node)
            heads, width = shape_of(args["q"])[2:]
            value = tensor_of(args["v"])
            assert value is not None
            kind, dtype = "scan", torch.promote_types(value.dtype, torch.float32)
            shape = [0, heads, width, value.shape[3]]
        elif node.target is ops.decayed_sum.default:
            args = named_args(node)
            value = tensor_of(args["x"])
            assert value is not None
            kind, dtype = "sum", torch.promote_types(value.dtype, torch.float32)
            shape = [s for i, s in enumerate(value.shape) if i != args["dim"]]
        else:
            continue
        name, counts[kind] = f"{kind}_{counts[kind]}", counts[kind] + 1
        each = [int(s) for s in shape[1:]]
        state = add_state(State(name, each, str(dtype).removeprefix("torch."), carried=True))
        cached = {"past": ops.cached_past, "sum": ops.cached_sum, "scan": ops.cached_scan}[kind].default
        args.pop("count", None)
        args |= {"past" if kind == "past" else "state": state, "valid": valid}
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(cached, op_args(cached, **args))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
