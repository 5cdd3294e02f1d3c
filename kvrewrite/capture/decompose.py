"""Takes composite ops apart, node by node: what `ExportedProgram.run_decompositions({})` does, without tracing anew.

That method runs the whole model twice more, with symbolic shapes: three quarters of the time of a capture. Here each
composite op is traced alone, once for all nodes with the same arguments (layers repeat), and put in the node's place. In-place
ops are made functional before (`in_place.py`). A graph with writes that are not known there takes the long way; and so does one
whose sizes depend on which of two is larger (a table that is sliced to the text's length): only the second trace finds out how
long texts may be.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvrewrite.capture.functionalize import functionalize
from kvrewrite.ir.fx import symbol

aten = torch.ops.aten
COMPOSITE = "CompositeImplicitAutograd"
# Arithmetic with sizes, and the parts of what an op returns several of.
PLAIN = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
    operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_,
    operator.or_, torch.sym_not, torch.sym_float, torch.sym_int,
}  # fmt: skip
# Ops that functionalization or export treat in ways of their own.
SPECIAL = (aten.lift_fresh.default, aten.lift.default)


def decompose(program: Any) -> Any:
    """A program (`torch.export.ExportedProgram`, fresh from export) in functional ops, without composite ops that may return
    their input or a view of it; those that never do (linear, scaled_dot_product_attention) stay."""
    # Weights that are more than one tensor (torchao's) come apart in the second trace.
    wrapped = any(is_traceable_wrapper_subclass(value) for value in program.state_dict.values())
    if not wrapped and all(_is_local(node) for node in program.graph.nodes) and functionalize(program.graph_module):
        _decompose_nodes(program.graph_module)
        return program
    return program.run_decompositions({})


def _is_local(node: fx.Node) -> bool:
    """Whether `node` may be taken apart without regard to the rest of the graph."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if _compares(node.meta.get("val")):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target in PLAIN
    return node.target not in SPECIAL


def _compares(value: Any) -> bool:
    """Whether a size in this value is the larger or the smaller of two."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    parts = (
        part
        for size in sizes
        if isinstance(size, torch.SymInt) and not size.node.expr.is_Atom
        for part in sympy.preorder_traversal(size.node.expr)
    )
    return any(type(part).__name__ in ("Max", "Min") for part in parts)


def _comes_apart(op: Any) -> bool:
    """Whether `op` is a composite that may return its input or a view of it."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), COMPOSITE)
    if not composite and torch._C.DispatchKey.CompositeImplicitAutograd not in op.py_kernels:
        return False
    return torch.Tag.maybe_aliasing_or_mutating in op.tags or any(
        a.alias_info is not None for a in op._schema.arguments
    )


def _decompose_nodes(gm: fx.GraphModule) -> None:
    graph = gm.graph
    sizes: dict[Any, fx.Node] = {}
    traced: dict[Any, fx.Graph] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and _comes_apart(node.target):
            inputs = node.all_input_nodes
            key = _key(node, inputs)
            if key not in traced:
                traced[key] = _trace(node, inputs)
            _inline(node, inputs, traced[key], sizes)
        elif isinstance(node.meta.get("val"), torch.SymInt):
            sizes.setdefault(symbol(node.meta["val"]), node)
    graph.eliminate_dead_code()


def _key(node: fx.Node, inputs: list[fx.Node]) -> Any:
    """Equal for nodes that come apart in the same way."""
    number = {n: i for i, n in enumerate(inputs)}
    arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"node {number[n]}")  # type: ignore[arg-type, return-value]
    return node.target, repr(arguments), tuple(repr(_facts(n.meta["val"])) for n in inputs)


def _facts(value: Any) -> Any:
    """What the trace of an op can depend on in an argument."""
    if isinstance(value, Tensor):
        sizes = [*value.shape, *value.stride(), value.storage_offset()]
        return [str(value.dtype), str(value.device), *(str(symbol(s)) for s in sizes)]
    if isinstance(value, (tuple, list)):
        return [_facts(v) for v in value]
    return str(symbol(value))


def _trace(node: fx.Node, inputs: list[fx.Node]) -> fx.Graph:
    """The graph of one op, with a placeholder for each of `inputs`."""
    target: Callable[..., Any] = node.target  # type: ignore[assignment]

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: given[n])
        return target(*args, **kwargs)

    values = [n.meta["val"] for n in inputs]
    with torch.no_grad():
        return make_fx(call, tracing_mode="real", _allow_non_fake_inputs=True)(*values).graph


def _inline(node: fx.Node, inputs: list[fx.Node], body: fx.Graph, sizes: dict[Any, fx.Node]) -> None:
    """Puts `body` in the place of `node`. sizes: the first node of each size, for those that the trace read off tensors."""
    env: dict[fx.Node, fx.Node] = dict(zip((n for n in body.nodes if n.op == "placeholder"), inputs, strict=True))
    graph = node.graph
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "output":
                _replace(node, fx.node.map_arg(inner.args[0], lambda n: env[n]))
            elif inner.op != "placeholder":
                value = inner.meta.get("val")
                size = symbol(value) if isinstance(value, torch.SymInt) else None
                if size is not None and size in sizes:
                    env[inner] = sizes[size]
                    continue
                env[inner] = graph.node_copy(inner, lambda n: env[n])
                env[inner].meta = {**node.meta, "val": value}
                if size is not None:
                    sizes[size] = env[inner]


def _replace(node: fx.Node, result: Any) -> None:
    """Lets the users of `node` use `result`: a node, or several that they pick from."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
