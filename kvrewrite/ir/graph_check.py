"""Checks what a graph from a file computes before anything runs: every value's dtype and shape, on fake tensors.

A file states what its values are (`val` of a node), and kernels are chosen by that. So everything is recomputed from
what the runtime and the weight files provide, and compared. Cache ops write in place and address pages, so these
arguments must be the program's own inputs (`_ROLES`) with the shapes that their kernels assume (`_SHAPES`).

Equal layers are computed once: values with the same dtype, shape and strides are the same object here, so calls with
the same arguments have the same result.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fx import get_attr, symbol
from kvrewrite.ir.layout import CacheClass, spec_of
from kvrewrite.ir.value_facts import NamedSizes

aten = torch.ops.aten
# Sizes for estimating memory and for checking numbers: about those of a short call, and of a long one.
_SMALL, _LARGE = 8, 4096
_MAX_NUMBER = 1 << 62
_MAX_EXPRESSION = 400  # terms of a size's formula; real ones have about ten
_MAX_POWER = 16
_MAX_RESULTS = 65_536  # of one call
_LEAST_MEMORY = 1 << 30  # what a graph may need in short calls, whatever the model's size
_SECONDS, _SECONDS_A_NODE = 60.0, 0.01
# Ops whose result torch can't predict without computing it; the file's statement is accepted and its uses are checked.
_UNKNOWN = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)
Symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)

# Arguments of cache ops that must be inputs of the program, and their kind.
_POOLS = ("k_pages", "v_pages", "score_pages", "pos_pages", "k_params", "v_params")
_VIEWS = ("table", "lens", "spare", "next_table")
_INPUTS = {
    "positions": "positions",
    "valid": "valid",
    "recent": "recent",
    "rotary": "position_ids",
    "following": "following",
    "renew": "renew",
    "span": "span",
}
_STATES = {
    "k_tail": "k_tail_",
    "v_tail": "v_tail_",
    "qlens": "qlens_",
    "threshold": "merge_",
    "past": "past_",
    "last": "last_logits",
    "k_state": "gate_k_",
    "v_state": "gate_v_",
}
_CACHE_OPS = {
    "cached_attention",
    "latent_attention",
    "observe",
    "cache_update",
    "cache_update_quantized",
    "read_quantized",
    "read_pages",
    "slot_rotary",
    "slot_positions",
    "rotate",
    "gate",
    "surprisal",
    "cached_past",
    "cached_scan",
    "cached_sum",
}
# Shapes by letters; a letter is the same size throughout a call. B, K, C are the rows, kv heads and slots of the table,
# T the new tokens, N all slots and new tokens.
_SHAPES = {
    "attention": "q BHTD k BKTD v BKTE sinks H alibi H",
    "cached_attention": (
        "q BHTD k BKTD v BKTE k_dense BKCD v_dense BKCE table BKP lens BK positions BT valid B sinks H alibi H hidden BKT"
    ),
    "latent_attention": "q BHTQ k BKTD table BKP lens BK positions BT valid B sinks H alibi H",
    "observe": (
        "q BHTD k BKTD lse BHT rows BT k_dense BKCD table BKP lens BK positions BT valid B alibi H hidden BKT above BT"
    ),
    "cache_update": (
        "k BKTD v BKTE new_scores BKT slot_scores BKC positions BT rotary BT valid B keep BK recent B table BKP lens BK "
        "select BKN drop BKT floor B spare BW next_table BKX threshold B"
    ),
    "cache_update_quantized": (
        "k BKTD v BKTE new_scores BKT slot_scores BKC positions BT rotary BT valid B keep BK recent B k_cached BKCD "
        "v_cached BKCE k_tail BKRD v_tail BKRE table BKP lens BK qlens BK select BKN drop BKT floor B spare BW "
        "next_table BKX threshold B"
    ),
    "read_quantized": "tail BKRD table BKP qlens BK",
    "read_pages": "table BKP",
    "slot_rotary": "table BKP lens BK following B renew B span ZY",
    "slot_positions": "table BKP lens BK positions BT valid B",
    "rotate": "x BKCD cos MD sin MD positions BKC partner D",
    "gate": "q BTG k BTG v BTG k_state BSG v_state BSG positions BT valid B",
    "surprisal": "logits BTV ids BT valid B last BV positions BT",
    "cached_scan": "q BTHN k BTHN v BTHP beta BTH state BHNP valid B",
}
_DTYPES = {
    "table": torch.int32,
    "lens": torch.int32,
    "keep": torch.int32,
    "valid": torch.int32,
    "recent": torch.int32,
    "qlens": torch.int32,
    "positions": torch.int64,
    "rotary": torch.int64,
    "hidden": torch.bool,
    "drop": torch.bool,
    "spare": torch.int32,
    "next_table": torch.int32,
}


class Sizes:
    """Makes fake tensors on one device whose sizes are numbers or named symbols; equal ones are the same object."""

    def __init__(self, device: torch.device):
        self.device = device
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=False)
        self.mode.cache_enabled = False  # this class already shares equal calls, and filling torch's cache takes longer
        self._sizes = NamedSizes(self.mode)
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def size(self, name: str) -> Any:
        """Returns the size of this name."""
        return self._sizes[name]

    def tensor(self, dtype: torch.dtype, shape: Sequence[int | str]) -> Tensor:
        """Returns a contiguous tensor."""
        key = (dtype, *shape)
        if key not in self._made:
            sizes = self._sizes.shape(shape)
            with self.mode:
                self._made[key] = self.same(torch.empty(sizes, dtype=dtype, device=self.device))
        return self._made[key]

    def same(self, tensor: Tensor) -> Tensor:
        """Returns the first tensor equal to this one."""
        if tensor.layout != torch.strided:
            raise ArtifactError(f"it makes a tensor of layout {tensor.layout}, expected a strided one")
        key = (
            tensor.dtype,
            tensor.device,
            tuple(symbol(s) for s in tensor.shape),
            tuple(symbol(s) for s in tensor.stride()),
        )
        return self._tensors.setdefault(key, tensor)


@dataclass
class Place:
    """What a graph is checked against. what: the file, for errors. classes: of the layout, for pools; empty if the
    graph has none. memory: bytes that values may take in a short call."""

    what: str
    sizes: Sizes
    classes: Sequence[CacheClass] = ()
    memory: int = _LEAST_MEMORY
    _memo: dict[Any, Any] = field(default_factory=dict)


def check_graph(gm: fx.GraphModule, inputs: Mapping[str, Tensor], place: Place) -> Any:
    """Recomputes all values of a graph; returns its output's. inputs: a fake tensor per placeholder.

    A value that the file describes (`meta["val"]`) is compared and replaced by the computed one. Raises ArtifactError
    that names the node, its op and what is wrong.
    """
    return _Check(gm, inputs, place).run()


class _Check:
    def __init__(self, gm: fx.GraphModule, inputs: Mapping[str, Tensor], place: Place):
        self.gm, self.inputs, self.place = gm, inputs, place
        self.sizes = place.sizes
        self.values: dict[fx.Node, Any] = {}
        self.held = 0
        self.updated: set[tuple[int, int]] = set()  # (class, index of the layer in it) whose cache is updated

    def run(self) -> Any:
        nodes = list(self.gm.graph.nodes)
        released = _last_uses(nodes)
        deadline = time.monotonic() + _SECONDS + _SECONDS_A_NODE * len(nodes)
        result = None
        for node in nodes:
            try:
                result = self._value(node)
                self._compare(node, result)
                self.values[node] = result
                if node.op == "call_function":
                    self.held += self._bytes(result)
                    if self.held > self.place.memory:
                        raise ArtifactError(
                            f"values up to here take {self.held} bytes at {_SMALL} tokens of {_SMALL} rows"
                        )
            except ArtifactError as error:
                raise ArtifactError(f"{self._where(node)}: {error}") from error.__cause__
            self.held -= sum(self._bytes(self.values[n]) for n in released.get(node, ()) if n.op == "call_function")
            if time.monotonic() > deadline:
                raise ArtifactError(f"{self._where(node)}: the graph takes too long to look at; the file is damaged")
        owned = {(c, i) for c, each in enumerate(self.place.classes) for i in range(len(each.layers))}
        if lacking := sorted(owned - self.updated):
            c, i = lacking[0]
            raise ArtifactError(
                f"{self.place.what}: nothing updates the cache of layer {self.place.classes[c].layers[i]}; the file is damaged"
            )
        return result

    def _where(self, node: fx.Node) -> str:
        return f"{self.place.what}: node {node.name!r} ({node.target})"

    # -- values
    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if str(node.target) not in self.inputs:
                raise ArtifactError("the runtime has no input of this name")
            return self.inputs[str(node.target)]
        if node.op == "get_attr":
            real = get_attr(self.gm, str(node.target))
            return self.sizes.tensor(real.dtype, list(real.shape))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.values[n])  # type: ignore[misc]
        if node.op == "output":
            return args[0]  # type: ignore[index]
        args = _any_layer(node.target, args)  # type: ignore[arg-type]
        key = (node.target, _key(args), _key(tuple(sorted(kwargs.items()))))  # type: ignore[union-attr]
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "kvrewrite":
            self._check_cache_op(node, args, kwargs)  # type: ignore[arg-type]
        if key not in self.place._memo:
            self.place._memo[key] = self._canonical(node, self._call(node, args, kwargs))  # type: ignore[arg-type]
        return self.place._memo[key]

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        env = self.sizes.shape_env
        function: Any = node.target
        if not isinstance(function, torch._ops.OpOverload):
            return _arithmetic(function, args)
        _refuse_tensors(function, args, kwargs)
        _refuse_many_results(function, args, kwargs)
        try:
            # The Python dispatcher: without it torch 2.11 treats sizes as numbers in composite ops (matmul).
            with self.sizes.mode, env.suppress_guards(), enable_python_dispatcher():
                return function(*args, **kwargs)
        except _UNKNOWN:
            return self._as_told(node)
        except Exception as error:  # torch raises many types; all are the graph's fault
            lines = str(error).strip().splitlines()
            raise ArtifactError(
                f"it can't be computed: {type(error).__name__}: {lines[0][:300] if lines else ''}; the file is damaged"
            ) from error

    def _as_told(self, node: fx.Node) -> Any:
        """Returns the file's statement about a value whose shape depends on data."""
        told = node.meta.get("val")
        if told is None:
            raise ArtifactError("its shape depends on data, and the file does not say what it is")
        return told

    def _canonical(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not isinstance(value, FakeTensor):
                raise ArtifactError("it makes a tensor in a way that can't be followed")
            for size in value.shape:
                _check_number(size)
            return self.sizes.same(value)
        if isinstance(value, (list, tuple)):
            if len(value) > _MAX_RESULTS:
                raise ArtifactError(f"it has {len(value)} results")
            return type(value)(self._canonical(node, v) for v in value)
        if value is None or isinstance(value, (bool, int, float, *Symbolic)):
            _check_number(value)
            return value
        raise ArtifactError(f"it gives a {type(value).__name__}, expected tensors and sizes")

    def _bytes(self, value: Any) -> int:
        if isinstance(value, (list, tuple)):
            return sum(self._bytes(v) for v in value)
        if not isinstance(value, Tensor):
            return 0
        count = value.element_size()
        for size in value.shape:
            count *= _at(size, _SMALL)
        return count

    def _compare(self, node: fx.Node, value: Any) -> None:
        """Checks that the file's statement about a value is true and replaces it with the computed value."""
        told = node.meta.get("val")
        if told is None:
            return
        wrong = _differs(told, value)
        if wrong:
            raise ArtifactError(f"the file says that it gives {wrong}; the file is damaged")
        node.meta["val"] = value

    # -- ops of the cache
    def _check_cache_op(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        op: Any = node.target
        base = op._schema.name.partition("::")[2]
        schema = op._schema.arguments
        nodes = dict(zip((a.name for a in schema), node.args)) | dict(node.kwargs)
        values = dict(zip((a.name for a in schema), args)) | kwargs
        for name, value in values.items():
            if isinstance(value, int) and not -(1 << 31) <= value < 1 << 63:
                raise ArtifactError(f"{name} is {value}")
        self._check_shapes(base, values)
        for argument in schema:
            if argument.alias_info is not None and argument.alias_info.is_write:
                source = nodes.get(argument.name)
                if source is not None and not _is_own_memory(source):
                    raise ArtifactError(
                        f"{argument.name}, which it writes to, is {source}; expected pages, lengths or a state of the cache"
                    )
        if base in _CACHE_OPS:
            self._check_roles(base, nodes, values)

    def _check_shapes(self, base: str, values: dict[str, Any]) -> None:
        letters: dict[str, Any] = {}
        if isinstance(values.get("table"), Tensor) and values["table"].dim() == 3:
            letters["C"] = values["table"].shape[2] * 64
            if isinstance(values.get("positions"), Tensor) and values["positions"].dim() == 2:
                letters["N"] = letters["C"] + values["positions"].shape[1]
        words = _SHAPES.get(base, "").split()
        for name, shape in zip(words[::2], words[1::2]):
            value = values.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dim() != len(shape):
                raise ArtifactError(f"{name} is {_shown(value)}; expected a tensor of {len(shape)} dimensions")
            if name in _DTYPES and value.dtype != _DTYPES[name] and base != "attention":
                raise ArtifactError(f"{name} is {_shown(value)}; expected {_DTYPES[name]}")
            for letter, size in zip(shape, value.shape):
                if symbol(letters.setdefault(letter, size)) != symbol(size):
                    raise ArtifactError(
                        f"{name} is {_shown(value)}, but its dimension {letter} is {symbol(letters[letter])} in the others"
                    )
        heads, groups = letters.get("H"), letters.get("K")
        if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
            raise ArtifactError(f"its {heads} heads can't share {groups} kv heads")

    def _check_roles(self, base: str, nodes: dict[str, Any], values: dict[str, Any]) -> None:
        """Checks that pages, tables, lengths and positions are the program's own inputs, all of one layer's cache."""
        found: set[tuple[int, int | None]] = set()
        for name, source in nodes.items():
            if source is None:
                continue
            if name in _POOLS or name in ("pool", "codes", "params"):
                kinds = (name,) if name in _POOLS else _POOLS
                found.add((self._class_of(name, source, kinds), None))
            elif name in _VIEWS:
                found.add(self._layer_of(name, source, name))
            elif name == "keep":
                found.add(self._layer_of(name, self._budget(source), name))
            elif name == "floor":
                found.add((self._class_of(name, source, ("floor",)), None))
            elif name in _INPUTS and base != "rotate":
                if not _is_input(source) or source.target != _INPUTS[name]:
                    raise ArtifactError(f"{name} is {source}; expected the input {_INPUTS[name]!r}")
            elif name in ("cos", "sin"):
                spec = spec_of(source)
                if spec is None or spec.part != f"rotary_{name}":
                    raise ArtifactError(f"{name} is {source}; expected an input rotary_{name}_...")
            elif name in _STATES or name == "state" or name == "tail":
                spec, wanted = spec_of(source), _STATES.get(name, "")
                if spec is None or spec.kind != "state" or not spec.part.startswith(wanted):
                    raise ArtifactError(f"{name} is {source}; expected an input state_{wanted}...")
        if base == "rotate":
            self._check_rotation(nodes)
        classes, layers = {c for c, _ in found}, {i for _, i in found if i is not None}
        if len(classes) > 1 or len(layers) > 1:
            raise ArtifactError("its pages, table and lengths belong to caches of several layers")
        if base.startswith("cache_update") and classes and layers:
            self._check_update(base, classes.pop(), layers.pop(), values)

    def _class_of(self, name: str, source: Any, kinds: Sequence[str]) -> int:
        spec = spec_of(source)
        if spec is None or spec.cls is None or spec.part not in kinds:
            raise ArtifactError(f"{name} is {source}; expected an input {' or '.join(kinds)}_..., pages of the cache")
        return spec.cls

    def _layer_of(self, name: str, source: Any, kind: str) -> tuple[int, int]:
        """Returns the class and the layer's index in it, for a layer's part of an input that all layers share."""
        selects = isinstance(source, fx.Node) and source.target is aten.select.int and len(source.args) == 3
        if not selects or source.args[1] != 0 or type(source.args[2]) is not int:
            raise ArtifactError(
                f"{name} is {source}; expected a layer's part of the input {kind}_... (aten.select.int)"
            )
        c, index = self._class_of(name, source.args[0], (kind,)), source.args[2]
        if not 0 <= index < len(self.place.classes[c].layers):
            raise ArtifactError(f"{name} is that of layer {index}, of {len(self.place.classes[c].layers)}")
        return c, index

    def _budget(self, source: Any) -> Any:
        """Returns the input that a budget comes from, directly or through ops that never give a head more than its
        pages."""
        if not isinstance(source, fx.Node):
            return source
        if source.target is torch.ops.kvrewrite.kept_above.default:
            return source.args[3]
        if source.target is operator.getitem:
            shared, index = source.args
            if isinstance(shared, fx.Node) and shared.target is torch.ops.kvrewrite.share_layers.default:
                budgets = shared.args[2]
                if isinstance(budgets, (list, tuple)) and type(index) is int and 0 <= index < len(budgets):
                    return budgets[index]
        if source.target is aten.full_like.default:  # unlimited: the window bounds it
            c, index = self._layer_of("keep", source.args[0], "keep")
            if self.place.classes[c].windows[index]:
                return source.args[0]
        return source

    def _check_rotation(self, nodes: dict[str, Any]) -> None:
        positions, partner = nodes["positions"], nodes["partner"]
        if not isinstance(positions, fx.Node) or positions.target is not torch.ops.kvrewrite.slot_rotary.default:
            raise ArtifactError(f"positions is {positions}; expected what slot_rotary gives")
        if not isinstance(partner, fx.Node) or partner.op != "get_attr":
            raise ArtifactError(f"partner is {partner}; expected a constant")
        channels = get_attr(self.gm, str(partner.target))
        fits = channels.dtype == torch.int64 and channels.dim() == 1
        if not fits or not bool(((channels >= 0) & (channels < len(channels))).all()):
            raise ArtifactError(f"partner ({partner.target}) is not a list of channels")

    def _check_update(self, base: str, c: int, index: int, values: dict[str, Any]) -> None:
        spec = self.place.classes[c]
        if (c, index) in self.updated:
            raise ArtifactError(f"the cache of layer {spec.layers[index]} is updated twice")
        self.updated.add((c, index))
        for name, width in (("k", spec.k_dim), ("v", spec.v_dim)):
            shape = values[name].shape
            if shape[1] != spec.kv_heads or shape[3] != width:
                raise ArtifactError(f"{name} is {_shown(values[name])}; the cache has {spec.kv_heads} heads of {width}")
        if (values["window"] or values["chunk"]) != spec.windows[index]:
            raise ArtifactError(
                f"window and chunk are {values['window']} and {values['chunk']}; the cache has pages for {spec.windows[index]}"
            )


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Returns, for each node, the nodes that are used last by it."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        for used in (node, *node.all_input_nodes):
            if used not in seen:
                seen.add(used)
                found.setdefault(node, []).append(used)
    return found


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _is_own_memory(node: Any) -> bool:
    """Whether a node is an input of the runtime, or a layer's part of one, that a program may write to."""
    if isinstance(node, fx.Node) and node.target is aten.select.int:
        node = node.args[0]
    spec = spec_of(node)
    return spec is not None and spec.written


def _any_layer(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replaces arguments by ones that give the same kind of value: the index of an existing layer does not matter."""
    if target is aten.select.int and len(args) == 3 and type(args[2]) is int and isinstance(args[0], Tensor):
        count = args[0].shape[args[1]] if args[1] == 0 and args[0].dim() else None
        if isinstance(count, int) and 0 <= args[2] < count:
            return (*args[:2], 0)
    return args


def _key(value: Any) -> Any:
    """Returns a key that distinguishes arguments."""
    if isinstance(value, Tensor):
        return ("tensor", id(value))
    if isinstance(value, Symbolic):
        return (type(value).__name__, value.node.expr)
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_key, value))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    return (type(value).__name__, repr(value))


def _refuse_tensors(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a tensor in place of a list or number: torch would iterate over its elements, which may not end."""
    given = {a.name: v for a, v in zip(op._schema.arguments, args)} | kwargs
    for argument in op._schema.arguments:
        value, kind = given.get(argument.name), str(argument.type)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not any(isinstance(part, Tensor) for part in parts):
            continue
        is_list = isinstance(value, (list, tuple))
        wanted = "List[" in kind if is_list else "List[" not in kind
        if not wanted or ("Tensor" not in kind and kind not in ("number", "Optional[number]")):
            raise ArtifactError(f"{argument.name} is {_shown(value)}; expected {kind}")


def _refuse_many_results(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses ops that split a tensor into its rows: they would do so for the example of a size too, which is large."""
    given = {a.name: v for a, v in zip(op._schema.arguments, args)} | kwargs
    whole = given.get("self")
    if not any("List[Tensor]" in str(r.type) for r in op._schema.returns) or not isinstance(whole, Tensor):
        return
    if isinstance(given.get("split_sizes", given.get("indices", given.get("sizes"))), (list, tuple)):
        return  # as many as the list has
    dim, each = given.get("dim", 0), given.get("split_size", 1)
    count = given.get("chunks", given.get("sections"))
    if (
        count is None
        and isinstance(dim, int)
        and -whole.dim() <= dim < whole.dim()
        and isinstance(each, int)
        and each > 0
    ):
        size = whole.shape[dim]
        count = -(-size // each) if isinstance(size, int) else size
    if not isinstance(count, int) or count > _MAX_RESULTS:
        raise ArtifactError(f"it gives {_shown(count)} results; expected a number up to {_MAX_RESULTS}")


def _arithmetic(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Calls Python's arithmetic on sizes."""
    if function is operator.getitem:
        results, index = args
        if not isinstance(results, (list, tuple)) or type(index) is not int or not 0 <= index < len(results):
            raise ArtifactError(f"there is no result {index!r:.40} of {_shown(results)}")
        return results[index]
    operands = args[0] if function is torch.sym_sum and isinstance(args[0], (list, tuple)) else args
    if not all(isinstance(a, (bool, int, float, *Symbolic)) for a in operands):
        raise ArtifactError(f"it computes with {', '.join(_shown(a) for a in operands)[:200]}; expected sizes")
    if function is operator.pow and not (isinstance(args[1], (int, float)) and abs(args[1]) <= _MAX_POWER):
        raise ArtifactError(f"the exponent {_shown(args[1])} is too large; expected a number up to {_MAX_POWER}")
    exact: dict[Any, Any] = {operator.not_: torch.sym_not}
    if any(isinstance(a, Symbolic) for a in operands):
        function = exact.get(function, function)
    try:
        return function(*args)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"it can't be computed: {type(error).__name__}: {str(error)[:200]}") from error


def _check_number(value: Any) -> None:
    if isinstance(value, Symbolic):
        expression = value.node.expr
        parts = sympy.preorder_traversal(expression)
        if sum(1 for _, _ in zip(range(_MAX_EXPRESSION), parts)) == _MAX_EXPRESSION:
            raise ArtifactError("its size is computed in too many steps")
        if isinstance(value, torch.SymBool):
            return
        value = _at(value, _LARGE)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not -_MAX_NUMBER < value <= (1 << 63):
        raise ArtifactError(f"the number {str(value)[:24]} is too large")


def _at(size: Any, every: int) -> int:
    """Returns a size with the same number for every symbol."""
    if not isinstance(size, Symbolic):
        return size  # type: ignore[no-any-return]
    expression = size.node.expr
    try:
        found = expression.xreplace({s: sympy.Integer(every) for s in expression.free_symbols})
        return int(found)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ArtifactError(f"its size {str(expression)[:80]} can't be computed: {error}") from error


def _differs(told: Any, value: Any) -> str:
    """Says how a fact of the file differs from a value; "" if it does not. Their symbols have different names."""
    if isinstance(told, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(told) != len(value):
            return f"{len(told)} results, and it gives {_shown(value)}"
        return next((wrong for t, v in zip(told, value) if t is not None and (wrong := _differs(t, v))), "")
    if isinstance(told, Tensor):
        fits = isinstance(value, Tensor) and told.dtype == value.dtype and told.dim() == value.dim()
        if fits and not any(_differs(a, b) for a, b in zip(told.shape, value.shape)):
            return ""
        return f"{_shown(told)}, and it gives {_shown(value)}"
    sizes = isinstance(value, (int, torch.SymInt)) and isinstance(told, torch.SymInt) == isinstance(value, torch.SymInt)
    if sizes and (isinstance(told, torch.SymInt) or told == value):
        return ""
    return f"{_shown(told)}, and it gives {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(symbol(s)) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_shown, value[:4]))}{', ...' if len(value) > 4 else ''})"
    return f"{value!s:.80}"


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are the same expressions."""
    return len(a) == len(b) and all(symbol(x) == symbol(y) for x, y in zip(a, b))
