"""Checks what a graph from a file computes before anything runs: every value's dtype and shape, on fake tensors.

A file states what its values are (`val` of a node), and kernels are chosen by that. So everything is recomputed from
what the runtime and the weight files provide, and compared (`fake_values.py`, `fake_calls.py`). What cache ops may be
given is checked in `cache_op_check.py`.

Equal layers are computed once: values with the same dtype, shape and strides are the same object here, so calls with
the same arguments have the same result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.cache_op_check import CacheOps
from kvrewrite.ir.fake_calls import MAX_RESULTS, Unpredictable, call
from kvrewrite.ir.fake_values import SMALL, Sizes, Symbolic, check_number, disagreement, size_at
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.layout import CacheClass

aten = torch.ops.aten
_LEAST_MEMORY = 1 << 30  # what a graph may need in short calls, whatever the model's size
_SECONDS, _SECONDS_A_NODE = 60.0, 0.01


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
        self.cache_ops = CacheOps(gm, place.classes)

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
                            f"values up to here take {self.held} bytes at {SMALL} tokens of {SMALL} rows"
                        )
            except ArtifactError as error:
                raise ArtifactError(f"{self._where(node)}: {error}") from error.__cause__
            self.held -= sum(self._bytes(self.values[n]) for n in released.get(node, ()) if n.op == "call_function")
            if time.monotonic() > deadline:
                raise ArtifactError(f"{self._where(node)}: the graph takes too long to look at; the file is damaged")
        if (layer := self.cache_ops.not_updated()) is not None:
            raise ArtifactError(f"{self.place.what}: nothing updates the cache of layer {layer}; the file is damaged")
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
            self.cache_ops.check(node, args, kwargs)  # type: ignore[arg-type]
        if key not in self.place._memo:
            self.place._memo[key] = self._canonical(self._call(node, args, kwargs))  # type: ignore[arg-type]
        return self.place._memo[key]

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return call(node.target, args, kwargs, self.sizes)
        except Unpredictable:  # the file's statement is accepted, and its uses are checked
            told = node.meta.get("val")
            if told is None:
                raise ArtifactError("its shape depends on data, and the file does not say what it is") from None
            return told

    def _canonical(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not isinstance(value, FakeTensor):
                raise ArtifactError("it makes a tensor in a way that can't be followed")
            for size in value.shape:
                check_number(size)
            return self.sizes.same(value)
        if isinstance(value, (list, tuple)):
            if len(value) > MAX_RESULTS:
                raise ArtifactError(f"it has {len(value)} results")
            return type(value)(self._canonical(v) for v in value)
        if value is None or isinstance(value, (bool, int, float, *Symbolic)):
            check_number(value)
            return value
        raise ArtifactError(f"it gives a {type(value).__name__}, expected tensors and sizes")

    def _bytes(self, value: Any) -> int:
        if isinstance(value, (list, tuple)):
            return sum(self._bytes(v) for v in value)
        if not isinstance(value, Tensor):
            return 0
        count = value.element_size()
        for size in value.shape:
            count *= size_at(size, SMALL)
        return count

    def _compare(self, node: fx.Node, value: Any) -> None:
        """Checks that the file's statement about a value is true and replaces it with the computed value."""
        told = node.meta.get("val")
        if told is None:
            return
        wrong = disagreement(told, value)
        if wrong:
            raise ArtifactError(f"the file says that it gives {wrong}; the file is damaged")
        node.meta["val"] = value


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
