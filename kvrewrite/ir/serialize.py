"""Graphs as plain JSON data, and back.

A saved graph is data, never code: each node names an op on an explicit allow-list, and reading one checks everything
before `torch.fx` sees it. That matters more than it seems, because `torch.fx` turns a graph into Python source and
executes it: node names, attribute names and keyword names all end up in that source, so each must look like a name.

The allow-list is by namespace: the `kvrewrite` ops that `insert_cache` and policies write (`KVREWRITE`), the functional `aten`
overloads of base names that decoders use
(`ATEN`), a few `prims`, transformers' grouped matmul, and Python's arithmetic on sizes (`BUILTINS`). Allowing an op
means: its result depends on its arguments only, and nothing else changes. So not on it, on purpose: whatever writes to
an argument or to `out=` (except kvrewrite's own cache ops, whose mutation is declared), reads or writes files
(`from_file`, `save`) or draws from a device generator (`rand*`, `bernoulli`, `dropout`), makes views by strides
(`as_strided`, `_reshape_alias`, which does not even look at the end of the memory) or leaves memory as it was
(`empty_strided`; `empty` is read as zeros), and every higher-order op, because those carry subgraphs.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import kvrewrite.ops  # noqa: F401  (registers the ops that graphs are made of)
from kvrewrite.errors import ArtifactError
from kvrewrite.ir import schema
from kvrewrite.ir.fx import ZEROED, clear_memory, set_attr
from kvrewrite.ir.value_facts import DTYPES, FactReader, FactWriter

GRAPH_FORMAT = 2

ATEN = frozenset(
    """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv alias all amax amin aminmax any arange argmax argmin
    argsort asin asinh atan atan2 atanh baddbmm bincount bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat ceil celu chunk clamp
    clamp_max clamp_min clone column_stack complex concat constant_pad_nd contiguous conv1d convolution copy cos cosh
    count_nonzero cross cummax cummin cumprod cumsum detach detach_copy diag diag_embed diagonal diff div divide dot
    dstack einsum elu embedding empty empty_like eq equal erf erfc erfinv exp exp2 expand
    expand_as expand_copy expm1 eye fill flatten flip floor floor_divide fmax fmin fmod frac full full_like gather ge
    gelu glu greater greater_equal group_norm gt hardsigmoid hardswish hardtanh histc hstack hypot imag index
    index_add index_copy index_fill index_put index_reduce index_select isclose isfinite isin isinf isnan isneginf
    isposinf kthvalue layer_norm le leaky_relu lerp less less_equal lift_fresh_copy linalg_norm linalg_vector_norm
    linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logical_and
    logical_not logical_or logical_xor logit logspace logsumexp lt masked_fill masked_scatter masked_select matmul max
    maximum mean median min minimum mish mm moveaxis movedim mul multiply mv narrow narrow_copy native_group_norm
    native_layer_norm ne neg negative new_empty new_full new_ones new_zeros nonzero norm not_equal
    numpy_T one_hot ones ones_like outer pad permute permute_copy pixel_shuffle polar positive pow prelu prod ravel
    real reciprocal relu relu6 remainder repeat repeat_interleave reshape resolve_conj resolve_neg rms_norm roll rot90
    round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select
    select_copy select_scatter selu sgn sigmoid sign signbit silu sin sinh slice slice_copy slice_scatter softmax
    softplus sort split split_copy split_with_sizes split_with_sizes_copy sqrt square squeeze squeeze_copy stack std
    std_mean sub subtract sum swapaxes swapdims sym_numel sym_size sym_storage_offset sym_stride t t_copy take
    take_along_dim tan tanh tensor_split threshold tile to topk transpose transpose_copy tril tril_indices triu
    triu_indices true_divide trunc type_as unbind unbind_copy unflatten unfold unfold_copy unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_nearest1d var var_mean vdot view view_as view_as_complex
    view_as_real view_copy vstack where xlogy zeros zeros_like
    _assert_async _assert_scalar _assert_tensor_metadata _conj _grouped_mm _local_scalar_dense _log_softmax
    _reshape_copy _safe_softmax _scaled_dot_product_attention_math _scaled_grouped_mm _scaled_mm _softmax
    _to_copy _unsafe_index _unsafe_index_put _unsafe_view _weight_int8pack_mm item
    sym_constrain_range sym_constrain_range_for_size
    """.split()  # noqa: SIM905 (300 quoted strings are unreadable)
)
# Ops of ours in graphs that are saved. Those that lowering makes are not among them: a file that has them was not written by us.
KVREWRITE = frozenset(
    """
    attention cache_update cache_update_quantized cached_attention cached_past cached_scan cached_sum decayed_sum
    expected_attention gate kept_above key_difference latent_attention linear_scan newest_ranks newest_rows observe pool_window
    ranks read_pages read_quantized rotate share_layers sink_gate slot_positions slot_rotary surprisal uniform with_past
    """.split()  # noqa: SIM905
)
PRIMS = frozenset({"broadcast_in_dim", "convert_element_type", "iota", "view_of"})
# Ops that other libraries register, and the module that registers them.
LIBRARY_OPS = {"transformers.grouped_mm_fallback.default": "transformers.integrations.moe"}

BUILTINS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lt", "mod", "mul", "ne", "neg",
            "not_", "or_", "pow", "sub", "truediv",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum",
    )},
    "torch._sym_sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
}  # fmt: skip
_BUILTIN_NAMES = {id(function): name for name, function in BUILTINS.items()}
_ONE_ARGUMENT = {
    "operator.abs", "operator.neg", "operator.not_", "math.ceil", "math.floor", "math.sqrt", "math.trunc",
    "torch._sym_sqrt", "torch.sym_float", "torch.sym_int", "torch.sym_not", "torch.sym_sum",
}  # fmt: skip

LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PATH = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*\Z")


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= schema.MAX_STRING
        and bool(_NAME.match(value))
        and not keyword.iskeyword(value)
    )


# ---------------------------------------------------------------------------------------------------------- allow-list
def op_name(target: Any) -> str:
    """How a graph file names the function that a node calls; ArtifactError when it is not on the allow-list."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        resolve_op(name)
        return name
    if id(target) in _BUILTIN_NAMES:
        return _BUILTIN_NAMES[id(target)]
    shown = (
        str(target) if isinstance(target, torch._ops.OperatorBase) else getattr(target, "__qualname__", repr(target))
    )
    module = getattr(target, "__module__", None)
    raise ArtifactError(_refusal(f"{module}.{shown}" if module and not shown.startswith(module) else shown))


def _refusal(name: str) -> str:
    return (
        f"the op {name!r} is not on the list of ops that a saved graph may use (functional aten ops, kvrewrite's own, "
        "arithmetic on sizes). Files of kvrewrite never contain others; if your model needs it, ask for it to be added "
        "to kvrewrite/ir/serialize.py"
    )


def resolve_op(name: Any) -> Callable[..., Any]:
    """The function that a graph file calls `name`; ArtifactError when it is not on the allow-list."""
    if not isinstance(name, str) or len(name) > schema.MAX_STRING:
        raise ArtifactError(f"an op's name must be a string, got {type(name).__name__}")
    if name in BUILTINS:
        return BUILTINS[name]
    parts = name.split(".")
    if len(parts) != 3 or not all(_NAME.match(p) for p in parts):
        raise ArtifactError(_refusal(name))
    namespace, base, overload = parts
    if namespace == "aten":
        allowed = base in ATEN
    elif namespace == "prims":
        allowed = base in PRIMS
    elif namespace == "kvrewrite":
        allowed = base in KVREWRITE and overload == "default"
    else:
        allowed = name in LIBRARY_OPS
    if not allowed:
        raise ArtifactError(_refusal(name))
    if name in LIBRARY_OPS:
        importlib.import_module(LIBRARY_OPS[name])
    try:
        packet = getattr(getattr(torch.ops, namespace), base)
        found = getattr(packet, overload) if overload in packet.overloads() else None
    except AttributeError:
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(f"the op {name!r} does not exist in this installation (torch {torch.__version__})")
    if namespace != "kvrewrite" and found._schema.is_mutable:
        raise ArtifactError(_refusal(name) + " (it writes to one of its arguments)")
    return found


# ------------------------------------------------------------------------------------------------------------- writing
def graph_to_dict(gm: fx.GraphModule) -> dict[str, Any]:
    """The graph of `gm` as plain JSON data, without its tensors, with what is known about its values.

    Raises ArtifactError that names the node for an op or an argument that a saved graph may not have.
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
    """One argument as JSON data: plain values as they are, everything else as an object with one key, its tag."""
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
    """The graph in a file, as `graph_from_dict`."""
    data = schema.decode(schema.read_bytes(path), schema.Graph, path)
    return _build(data, tensors, device, str(path))


def graph_from_dict(
    data: Any, tensors: Mapping[str, Tensor], device: torch.device | str | None = None, what: str = "the graph"
) -> fx.GraphModule:
    """The inverse of `graph_to_dict`.

    data: what a graph file holds; it is not trusted. tensors: by attribute name; parameters stay parameters. device:
    what the device arguments in the graph become; default: the device of the first tensor, else the CPU. what: the file, for
    errors. Raises ArtifactError that names the node and the reason.
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


# Indices that nobody checks are for code that made them itself.
_CHECKED: dict[Any, Any] = {
    torch.ops.aten._unsafe_index.Tensor: torch.ops.aten.index.Tensor,
    torch.ops.aten._unsafe_index_put.default: torch.ops.aten.index_put.default,
}


def _check_call(where: str, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Whether the call fits the op's schema in number and names of arguments."""
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
    """What is wrong with a value for an argument of a schema, where that is plain without running the op."""
    kind = str(argument.type)
    if isinstance(value, fx.Node):
        # Switches decide about shapes, so they can't be computed.
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
    """The inverse of `_encode`, for data that is not trusted."""
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
    """Puts a tensor on a module under a dotted name that comes from a file; ArtifactError where it can't be there."""
    try:
        set_attr(root, name, tensor)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{name!r} can't be the name of a tensor: {error}") from error


# ------------------------------------------------------------------------------------------------------------- devices
def retarget_device(gm: fx.GraphModule, device: torch.device | str) -> None:
    """Rewrites every device argument in a live graph to `device`, so that the graph runs where its tensors are.

    Ops that make tensors from nothing and say no device get one too: their default would be the CPU.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function":
            put_on(node, torch.device(device))
    gm.recompile()


def put_on(node: fx.Node, device: torch.device) -> None:
    """The same for one call; the graph has to be compiled again."""

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
