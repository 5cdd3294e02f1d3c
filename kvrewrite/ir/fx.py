"""Small helpers for `torch.fx` graphs that every pass uses."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

SIZE_OPS = (torch.ops.aten.sym_size.int,)
# Uninitialized memory may hold anything, even others' data; programs have zeros instead.
ZEROED = {
    torch.ops.aten.empty.memory_format: torch.ops.aten.zeros.default,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
}


def is_op(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets` (op overloads or builtins)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


@cache
def parameters(target: Any) -> dict[str, tuple[int, Any]]:
    """Returns an op's parameters in schema order: name -> (index, default). Required ones default to None."""
    return {a.name: (i, a.default_value) for i, a in enumerate(target._schema.arguments)}


def arg(node: Any, name: str) -> Any:
    """Returns a call's argument for the parameter `name`, or its default. Raises KeyError if there is no such
    parameter."""
    place, default = parameters(node.target)[name]
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def named_args(node: Any) -> dict[str, Any]:
    """Returns all arguments of a call by name, defaults included."""
    return {name: arg(node, name) for name in parameters(node.target)}


def op_args(target: Any, **named: Any) -> tuple[Any, ...]:
    """Returns positional arguments for a call of an op, up to the last one that is named.

    Raises TypeError if the op has no parameter of a name, or if a required one is missing."""
    schema = target._schema.arguments
    unknown = named.keys() - parameters(target).keys()
    missing = [a.name for a in schema if a.name not in named and not a.has_default_value()]
    if unknown or missing:
        raise TypeError(
            f"{target}: no parameters {sorted(unknown)}, missing arguments {missing}; its schema: {target._schema}"
        )
    last = max((parameters(target)[name][0] for name in named), default=-1)
    return tuple(named.get(a.name, a.default_value) for a in schema[: last + 1])


def set_args(node: fx.Node, **named: Any) -> None:
    """Changes arguments of a call in place."""
    node.args, node.kwargs = op_args(node.target, **{**_given(node), **named}), {}


def _given(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments that a call gives explicitly, by name."""
    return dict(zip(parameters(node.target), node.args)) | node.kwargs


def is_size(node: Any) -> bool:
    """Whether `node` computes a size (an int), not a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), (torch.SymInt, int))


def tensor_of(node: Any) -> torch.Tensor | None:
    """Returns the fake tensor that `node` produces, or None if it does not produce one tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Returns the symbolic shape of the tensor that `node` produces."""
    value = tensor_of(node)
    if value is None:
        raise ValueError(f"{node.name} ({node.target}) does not produce a tensor")
    return tuple(value.shape)


def module_path(node: fx.Node) -> str:
    """Returns the path of the innermost module that made `node`, "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and entry[0]]
    return clean_path(paths[-1]) if paths else ""


def clean_path(path: str) -> str:
    """Removes from a module path what export and our capture wrapper add to it."""
    path = re.sub(r"^L\['self'\]\.?", "", path)
    path = re.sub(r"\[(?:'|\")?(\w+)(?:'|\")?\]", r".\1", path).removeprefix("_modules.")
    return path.removeprefix("model_under_capture.").removeprefix("model_under_capture")


def ancestors(roots: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda _: False) -> set[fx.Node]:
    """Returns all nodes that `roots` depend on, roots included; does not look past nodes where `stop` is true."""
    seen: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if not stop(node):
            todo.extend(node.all_input_nodes)
    return seen


def dependents(roots: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda _: False) -> set[fx.Node]:
    """Returns all nodes that depend on `roots`, roots included; does not go past nodes where `stop` is true."""
    seen: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if not stop(node):
            todo.extend(node.users)
    return seen


def placeholder(gm: fx.GraphModule, name: str) -> fx.Node | None:
    """Returns the graph input called `name`, or None."""
    return next((n for n in gm.graph.nodes if n.op == "placeholder" and n.target == name), None)


def add_placeholder(gm: fx.GraphModule, name: str, val: Any = None) -> fx.Node:
    """Adds a graph input after the existing ones."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node.meta["val"] = val
    return node


def output_node(gm: fx.GraphModule) -> fx.Node:
    """Returns the graph's output node."""
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")


def names_of_attributes(gm: fx.GraphModule) -> set[str]:
    """The names that `get_attr` nodes of a graph read."""
    return {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}


def get_attr(gm: torch.nn.Module, name: str) -> Any:
    """Returns the parameter or buffer that a `get_attr` node with target `name` reads."""
    return operator.attrgetter(name)(gm)


def set_attr(gm: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Sets a parameter or buffer at a dotted path; makes missing modules."""
    *path, leaf = name.split(".")
    module: torch.nn.Module = gm
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def symbol(size: Any) -> Any:
    """Returns the sympy expression of a symbolic size, or the int itself."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def fake_value(node: fx.Node) -> Any:
    """Computes a call's fake value from the fake values (`meta["val"]`) of its arguments.

    The sizes of the trace stay symbols. Otherwise torch may replace one by the number that it was traced with, in all
    values, and then the sequence can't be found (torch 2.11 does so in composite ops, unless they go through Python).
    """
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])  # type: ignore[misc]
    read = node.all_input_nodes
    if any(map(is_size, read)) and not any(tensor_of(n) is not None for n in read):
        read = [n for n in node.graph.nodes if n.op == "placeholder"]  # it makes a tensor only from sizes
    modes = {v.fake_mode for n in read if (v := tensor_of(n)) is not None and hasattr(v, "fake_mode")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(enable_python_dispatcher())
        for mode in modes:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        return node.target(*args, **kwargs)  # type: ignore[operator]


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression (without asking the shape environment to specialize)."""
    return bool(symbol(a) == symbol(b))


def concretize(shape: Sequence[Any], sizes: dict[Any, int]) -> tuple[int, ...]:
    """Replaces the symbols in `shape` with the numbers in `sizes` (symbol -> int)."""
    out = []
    for size in shape:
        expr = symbol(size)
        if expr in sizes:
            out.append(sizes[expr])
        else:
            out.append(int(expr.subs(sizes)) if hasattr(expr, "subs") else int(expr))
    return tuple(out)


def erase_dead(gm: fx.GraphModule) -> None:
    """Erases nodes without users or side effects. Our mutating ops stay."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or mutates(n))


def mutates(node: fx.Node) -> bool:
    """Whether `node` calls an op whose schema says that it writes to an argument."""
    return (
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def clear_memory(node: fx.Node) -> None:
    """Makes a node of `ZEROED` produce zeros."""
    node.target = ZEROED[node.target]  # type: ignore[index]
    if node.target is torch.ops.aten.zeros.default:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}


def fingerprint(graph: fx.Graph) -> str:
    """Returns the graph as text with numbered nodes: equal for graphs that compute the same in the same order.

    Placeholders are numbered too, so their names do not matter; `get_attr` targets do.
    """
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")  # type: ignore[arg-type, return-value]
        lines.append(f"{node.op} {target} {arguments}")
    return "\n".join(lines)
