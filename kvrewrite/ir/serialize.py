"""Turns graphs into plain JSON data, and back.

A saved graph is data, never code: each node names an op on an explicit allow-list (`allow_list.py`), and reading checks
everything before `torch.fx` sees it. This matters because `torch.fx` turns a graph into Python source and executes it:
node, attribute and keyword names all end up in that source, so each must look like a name.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import kvrewrite.ops  # noqa: F401  (registers the ops that graphs are made of)
from kvrewrite.errors import ArtifactError
from kvrewrite.ir import schema
from kvrewrite.ir.allow_list import NAME, op_name, resolve_op
from kvrewrite.ir.fx import ZEROED, clear_memory, set_attr
from kvrewrite.ir.value_facts import DTYPES, FactReader, FactWriter

GRAPH_FORMAT = 2
_ONE_ARGUMENT = {
    "operator.abs",
    "operator.neg",
    "operator.not_",
    "math.ceil",
    "math.floor",
    "math.sqrt",
    "math.trunc",
    "torch._sym_sqrt",
    "torch.sym_float",
    "torch.sym_int",
    "torch.sym_not",
    "torch.sym_sum",
}

LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}

_PATH = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*\Z")


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= schema.MAX_STRING
        and bool(NAME.match(value))
        and not keyword.iskeyword(value)
    )


# ------------------------------------------------------------------------------------------------------------- writing
def graph_to_dict(gm: fx.GraphModule) -> dict[str, Any]:
    """Returns the graph of `gm` as plain JSON data, without its tensors, with what is known about its values.

    Raises ArtifactError that names the node if an op or argument is not allowed in a saved graph.
    """
    nodes = []
    facts = FactWriter()
    for node in gm.graph.nodes:
        where = f"node {node.name!r}"
        if node.op == "call_function":
            try:
                target = op_name(node.target)
            except ArtifactError as error:
                raise ArtifactError(f"{where}: {error}") from None
        elif node.op in ("placeholder", "get_attr", "output"):
            target = str(node.target)
        else:
            raise ArtifactError(f"{where} is a {node.op} of {node.target}; a saved graph has functions only")
        if node.op == "get_attr" and not isinstance(_attribute(gm, target), Tensor):
            raise ArtifactError(f"{where} reads {target!r}, which is not a tensor (subgraphs can't be saved)")
        entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
        entry["args"] = [_encode(a, where) for a in node.args]
        entry["kwargs"] = {
            k: {"device": "model"} if k == "device" and isinstance(v, str) else _encode(v, where)
            for k, v in node.kwargs.items()
        }
        meta = {
            k: v for k, v in node.meta.items() if str(k).startswith("kvrewrite_") and type(v) in (str, int, bool, float)
        }
        if meta:
            entry["meta"] = meta
        fact = facts(node.meta.get("val"))
        if fact is not None:
            entry["val"] = fact
        nodes.append(entry)
    return {"format": GRAPH_FORMAT, "nodes": nodes}


def _attribute(gm: nn.Module, path: str) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _encode(value: Any, where: str) -> Any:
    """Encodes one argument as JSON data: plain values as they are, anything else as an object with one key, its tag."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (tuple, torch.Size)):
        return {"tuple": [_encode(v, where) for v in value]}
    if isinstance(value, list):
        return [_encode(v, where) for v in value]
    if isinstance(value, slice):
        return {"slice": [_encode(v, where) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "model"}
    for tag, table in (("layout", LAYOUTS), ("memory_format", MEMORY_FORMATS)):
        for name, known in table.items():
            if value is known or (type(value) is type(known) and value == known):
                return {tag: name}
    raise ArtifactError(
        f"{where} has an argument of type {type(value).__name__} ({value!r:.80}); a saved graph can hold nodes, "
        "numbers, strings, dtypes, devices, layouts, memory formats, slices and lists of these"
    )


# ------------------------------------------------------------------------------------------------------------- reading
def read_graph(path: Path, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> fx.GraphModule:
    """Reads the graph in a file; see `graph_from_dict`."""
    data = schema.decode(schema.read_bytes(path), schema.Graph, path)
    return _build(data, tensors, device, str(path))


def graph_from_dict(
    data: Any, tensors: Mapping[str, Tensor], device: torch.device | str | None = None, what: str = "the graph"
) -> fx.GraphModule:
    """Inverts `graph_to_dict`.

    data: the content of a graph file; it is not trusted. tensors: by attribute name; parameters stay parameters.
    device: replaces the device arguments in the graph; default: the device of the first tensor, else the CPU. what: the
    file, for errors. Raises ArtifactError that names the node and the reason.
    """
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list):
        raise ArtifactError(f"{what} must be an object with a list of nodes; the file is damaged or not a graph")
    return _build(schema.check(data, schema.Graph, what), tensors, device, what)


def _build(
    data: schema.Graph, tensors: Mapping[str, Tensor], device: torch.device | str | None, what: str
) -> fx.GraphModule:
    if data.format != GRAPH_FORMAT:
        raise ArtifactError(
            f"{what} has format {data.format!r:.40}, this kvrewrite reads {GRAPH_FORMAT}; install the kvrewrite "
            "that wrote it (kvrewrite.json names its version), or convert the model again"
        )
    if device is None:
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
    device = torch.device(device)
    root = nn.Module()
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    seen_attributes: set[str] = set()
    finished = False
    facts = FactReader(device)
    try:
        for index, entry in enumerate(data.nodes):
            if finished:
                raise ArtifactError(f"node {index} comes after the output; expected the output last")
            node = _read_node(entry, graph, env, device)
            if entry.val is not None:
                node.meta["val"] = facts(entry.val, f"node {node.name!r}")
            if node.op == "get_attr":
                _attach(root, str(node.target), node.name, tensors, seen_attributes)
            finished = node.op == "output"
        if not finished:
            raise ArtifactError("it has no output; the file is cut off or damaged")
        graph.lint()
        return fx.GraphModule(root, graph, class_name="RewrittenModel")
    except ArtifactError as error:
        raise ArtifactError(f"{what}: {error}") from error.__cause__
    except (RuntimeError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{what} is not well formed: {str(error)[:400]}") from error


def _read_node(entry: schema.Node, graph: fx.Graph, env: dict[str, fx.Node], device: torch.device) -> fx.Node:
    """Checks one entry and adds it to the graph."""
    name, op, target = entry.name, entry.op, entry.target
    where = f"node {name!r}"
    if name in env:
        raise ArtifactError(f"{where} is defined twice")
    args = tuple(_decode(a, where, env, device) for a in entry.args)
    kwargs = {k: _decode(v, where, env, device) for k, v in entry.kwargs.items()}
    if found := [key for key in kwargs if keyword.iskeyword(key)]:
        raise ArtifactError(f"{where}: {found[0]!r} is not a keyword argument's name")
    function: Any = target
    if op == "call_function":
        try:
            function = resolve_op(target)
        except ArtifactError as error:
            raise ArtifactError(f"{where}: {error}") from None
        _check_call(where, target, function, args, kwargs)
    elif op == "placeholder":
        if not _is_name(target) or kwargs or len(args) > 1 or any(isinstance(a, fx.Node) for a in args):
            raise ArtifactError(f"{where}: an input needs a name and takes no arguments besides a default")
    elif op == "get_attr":
        if not _PATH.match(target) or args or kwargs:
            raise ArtifactError(
                f"{where}: {target!r:.80} is not the dotted name of a tensor (letters, digits, '_' and '-' only)"
            )
    elif target != "output" or len(args) != 1 or kwargs:
        raise ArtifactError(f"{where}: the output takes exactly one argument")
    node = graph.create_node(op, function, args, kwargs, name=name)
    if node.name != name:
        raise ArtifactError(f"{where}: the name is reserved by Python; the file was not written by kvrewrite")
    if node.target in ZEROED:
        clear_memory(node)
    node.target = _CHECKED.get(node.target, node.target)  # type: ignore[arg-type]
    node.meta.update(entry.meta)
    env[name] = node
    return node


# Unchecked indices are only for code that made them itself.
_CHECKED: dict[Any, Any] = {
    torch.ops.aten._unsafe_index.Tensor: torch.ops.aten.index.Tensor,
    torch.ops.aten._unsafe_index_put.default: torch.ops.aten.index_put.default,
}


def _check_call(where: str, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Checks that the call fits the op's schema in number and names of arguments."""
    if not isinstance(function, torch._ops.OpOverload):
        arity = 1 if name in _ONE_ARGUMENT else 3 if name == "torch.sym_ite" else 2
        if kwargs or len(args) != arity:
            raise ArtifactError(f"{where}: {name} takes {arity} arguments by position, got {len(args) + len(kwargs)}")
        return
    schema = function._schema.arguments
    positional = [a for a in schema if not a.kwarg_only]
    if len(args) > len(positional):
        raise ArtifactError(f"{where}: {name} takes {len(positional)} positional arguments, got {len(args)}")
    given = {a.name for a in positional[: len(args)]}
    for key in kwargs:
        if key in given or all(a.name != key for a in schema):
            raise ArtifactError(f"{where}: {name} takes no further argument called {key!r}")
    missing = [a.name for a in schema if a.name not in given and a.name not in kwargs and not a.has_default_value()]
    if missing:
        raise ArtifactError(f"{where}: {name} lacks {', '.join(missing)}")
    values = {a.name: v for a, v in zip(positional, args)} | kwargs
    for argument in schema:
        if argument.name in values and (problem := _wrong_type(argument, values[argument.name])):
            raise ArtifactError(f"{where}: {name} expects {argument.type} for {argument.name!r}, got {problem}")


def _wrong_type(argument: Any, value: Any) -> str | None:
    """Says what is wrong with a value for a schema's argument, if that is clear without running the op."""
    kind = str(argument.type)
    if isinstance(value, fx.Node):
        # Switches decide shapes, so they can't be computed.
        return f"what {value.name!r} computes" if kind in ("bool", "Optional[bool]", "str", "Optional[str]") else None
    if value is None:
        return None if kind.startswith("Optional") or "None" in kind or argument.has_default_value() else "nothing"
    # A Tensor argument may be a number: export keeps `x * 2` as mul.Tensor(x, 2).
    if kind == "Tensor" and not isinstance(value, (int, float)):
        return type(value).__name__
    if kind.startswith("List[") and not isinstance(value, (list, tuple)):
        # A one-element list may be written as a number (`sum.dim_IntList(x, -1)`).
        return None if isinstance(value, (int, float)) and "Tensor" not in kind else type(value).__name__
    if kind in ("int", "float", "bool", "number", "Scalar") and not isinstance(
        value, (int, float, torch.dtype, torch.layout, torch.memory_format)
    ):
        return type(value).__name__
    return None


def _decode(value: Any, where: str, env: Mapping[str, fx.Node], device: torch.device) -> Any:
    """Inverts `_encode`, for data that is not trusted."""
    if isinstance(value, list):
        return [_decode(v, where, env, device) for v in value]
    if not isinstance(value, schema.Tagged):
        return value
    try:
        tag, inner = value.item()
    except ValueError as error:
        raise ArtifactError(f"{where} has an argument that can't be read: {error}") from None
    if tag == "node":
        if inner not in env:
            raise ArtifactError(f"{where} refers to node {inner!r:.80}, which is not defined before it")
        return env[inner]
    if tag == "tuple":
        return tuple(_decode(v, where, env, device) for v in inner)
    if tag == "slice":
        return slice(*(_decode(v, where, env, device) for v in inner))
    if tag == "float":
        return float(inner)
    if tag == "device":
        return device
    tables: dict[str, Mapping[str, Any]] = {"dtype": DTYPES, "layout": LAYOUTS, "memory_format": MEMORY_FORMATS}
    table = tables[tag]
    if inner not in table:
        raise ArtifactError(f"{where} has an argument that can't be read: the {tag} {inner!r:.80}")
    return table[inner]


def _attach(root: nn.Module, target: str, node: str, tensors: Mapping[str, Tensor], seen: set[str]) -> None:
    """Puts the tensor that a get_attr node reads on the module."""
    if target in seen:
        return
    if target not in tensors:
        raise ArtifactError(
            f"node {node!r} reads the tensor {target!r}, which the model's files lack; the directory is incomplete"
        )
    attach(root, target, tensors[target])
    seen.add(target)


def attach(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor on a module under a dotted name from a file; raises ArtifactError if the name is not possible."""
    try:
        set_attr(root, name, tensor)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{name!r} can't be the name of a tensor: {error}") from error


# ------------------------------------------------------------------------------------------------------------- devices
def retarget_device(gm: fx.GraphModule, device: torch.device | str) -> None:
    """Sets every device argument in a live graph to `device`, so that the graph runs where its tensors are.

    Ops that make tensors from nothing and name no device get one too: their default would be the CPU.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function":
            put_on(node, torch.device(device))
    gm.recompile()


def put_on(node: fx.Node, device: torch.device) -> None:
    """Does the same for one call; the graph must be recompiled afterwards."""

    def leaf(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    node.args = fx.node.map_aggregate(node.args, leaf)
    kwargs = {k: device if k == "device" and isinstance(v, str) else v for k, v in node.kwargs.items()}
    node.kwargs = fx.node.map_aggregate(kwargs, leaf)
    if isinstance(node.target, torch._ops.OpOverload) and _makes_from_nothing(node.target):
        at = [a.name for a in node.target._schema.arguments if not a.kwarg_only]
        if "device" not in node.kwargs and "device" not in at[: len(node.args)]:
            node.kwargs = {**node.kwargs, "device": device}


def _makes_from_nothing(target: torch._ops.OpOverload) -> bool:
    """Whether the op has a device argument and no tensor to take its device from."""
    arguments = target._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)
