"""Decomposes composite ops node by node, like `ExportedProgram.run_decompositions({})`, without another trace.

That method runs the whole model twice more with symbolic shapes: three quarters of a capture's time. Here each
composite op is traced alone, once for all nodes with the same arguments (layers repeat), and inlined in the node's
place. In-place ops are made functional first (`functionalize.py`). Two kinds of graph still use the method: those with
unknown writes, and those with a size that depends on which of two is larger (a table sliced to the text's length),
because only the second trace finds out how long texts may be.
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
# Arithmetic on sizes, and picking one of an op's several results.
PLAIN = {
    operator.getitem,
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.truediv,
    operator.mod,
    operator.neg,
    operator.pow,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.and_,
    operator.or_,
    torch.sym_not,
    torch.sym_float,
    torch.sym_int,
}
# Ops that functionalization or export treats specially.
SPECIAL = (aten.lift_fresh.default, aten.lift.default)


def decompose(program: Any) -> Any:
    """Makes a fresh `torch.export.ExportedProgram` functional and removes composite ops that may return their input or
    a view of it. Composite ops that never do (linear, scaled_dot_product_attention) stay."""
    # The second trace decomposes weights that are more than one tensor (torchao's).
    wrapped = any(is_traceable_wrapper_subclass(value) for value in program.state_dict.values())
    if not wrapped and all(_is_local(node) for node in program.graph.nodes) and functionalize(program.graph_module):
        _decompose_nodes(program.graph_module)
        return program
    return program.run_decompositions({})


def _is_local(node: fx.Node) -> bool:
    """Whether `node` can be decomposed without looking at the rest of the graph."""
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
    """Whether a size in this value is the maximum or minimum of two."""
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
    """Returns a key that is equal for nodes that decompose in the same way."""
    number = {n: i for i, n in enumerate(inputs)}
    arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"node {number[n]}")  # type: ignore[arg-type, return-value]
    return node.target, repr(arguments), tuple(repr(_facts(n.meta["val"])) for n in inputs)


def _facts(value: Any) -> Any:
    """Returns everything about an argument that the trace of an op can depend on."""
    if isinstance(value, Tensor):
        sizes = [*value.shape, *value.stride(), value.storage_offset()]
        return [str(value.dtype), str(value.device), *(str(symbol(s)) for s in sizes)]
    if isinstance(value, (tuple, list)):
        return [_facts(v) for v in value]
    return str(symbol(value))


def _trace(node: fx.Node, inputs: list[fx.Node]) -> fx.Graph:
    """Traces one op; the graph has a placeholder per entry of `inputs`."""
    target: Callable[..., Any] = node.target  # type: ignore[assignment]

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: given[n])
        return target(*args, **kwargs)

    values = [n.meta["val"] for n in inputs]
    with torch.no_grad():
        return make_fx(call, tracing_mode="real", _allow_non_fake_inputs=True)(*values).graph


def _inline(node: fx.Node, inputs: list[fx.Node], body: fx.Graph, sizes: dict[Any, fx.Node]) -> None:
    """Replaces `node` with `body`. sizes: the first node of each size, for sizes that the trace read from tensors."""
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
    """Replaces `node` with `result`: a node, or several that getitem nodes pick from."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
