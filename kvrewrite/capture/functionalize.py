"""Makes the in-place ops of a traced graph functional, node by node, without tracing it again.

The trace shows which nodes share memory: their fake tensors share storage. The first node in a storage that is written
to is its owner; all other nodes there are views of the owner. A write to the owner makes a new owner. A write to a view
is scattered into the tensor that it is a view of. Nodes that read after a write use the same views of the new owner. If
a write is of an unknown kind, or writes to an input's memory, the graph stays unchanged and the caller must make it
functional in another way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.ir.fx import fake_value, mutates, symbol

aten = torch.ops.aten
IDENTITIES = (aten.detach.default, aten.detach_.default)  # no-ops under no_grad
# View op -> function that turns a new value of the view into a new value of its input.
SCATTER = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
# These read memory by its strides, which a new value may not have.
BY_LAYOUT = (aten.as_strided.default,)


class _NotKnown(Exception):
    """The graph has a write that this module can't make functional."""


def functionalize(gm: fx.GraphModule) -> bool:
    """Removes in-place ops and `detach` from a graph; at an unknown write returns False and leaves the graph unchanged.

    gm: flat, traced by torch.export under no_grad, with the trace's fake tensors in `meta["val"]`. The node that
    replaces an in-place op has the same dtype, shape and strides.
    """
    graph = gm.graph
    written = [n for n in graph.nodes if mutates(n) and n.target not in IDENTITIES]
    if written:
        writes = _Writes(graph)
        try:
            writes.find(written)
            for node in list(graph.nodes):
                writes.visit(node)
        except _NotKnown:
            writes.undo()
            return False
        for node in reversed(written):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.lift_fresh_copy.default:  # outside a trace this is an ordinary copy
            node.target = aten.clone.default
    return True


class _Writes:
    """Walks a graph in order and tracks the current value of every storage that is written to.

    functional: in-place node -> its functional op. first, owner: storage -> its first node, and its current value.
    made: node -> its current value, and the owner it was made from. before: node -> its arguments before they were
    changed.
    """

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.functional: dict[fx.Node, Any] = {}
        self.memory: set[int] = set()
        self.first: dict[int, fx.Node] = {}
        self.owner: dict[int, fx.Node] = {}
        self.made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.inserted: list[fx.Node] = []
        self.before: dict[fx.Node, tuple[Any, Any]] = {}

    def find(self, written: list[fx.Node]) -> None:
        """Records what the in-place nodes write to."""
        for node in written:
            self.functional[node] = _functional(node.target)
            self.memory |= _storages(node.args[0])

    def visit(self, node: fx.Node) -> None:
        """Makes `node` read current values; if it writes, makes new ones."""
        single = isinstance(node.meta.get("val"), Tensor)  # an op with several results is no owner; each result is
        for storage in _storages(node) & self.memory if single else ():
            if storage not in self.first:
                if node.op != "call_function" or node in self.functional:
                    raise _NotKnown
                self.first[storage] = self.owner[storage] = node
        if node in self.functional:
            self._write(node)
            return
        if single and _is_view(node.target) and not any(_storages(node) & _storages(n) for n in node.all_input_nodes):
            raise _NotKnown  # the trace does not show what shares memory
        now = {n: self._current(n, node) for n in node.all_input_nodes}
        if any(now[n] is not n for n in now):
            self.before[node] = node.args, node.kwargs
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: now[n])  # type: ignore[assignment, misc]
        for storage in _storages(node) & self.owner.keys():
            self.made[node] = node, self.owner[storage]

    def _current(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Returns the value of `node` that `reader` must see."""
        lies_in = _storages(node) & self.first.keys()
        if not any(self.owner[s] is not self.first[s] for s in lies_in):
            return node
        if len(lies_in) > 1:
            raise _NotKnown
        (storage,) = lies_in
        owner = self.owner[storage]
        if node is self.first[storage]:
            return owner
        value, made_of = self.made.get(node, (None, None))
        if value is not None and made_of is owner:
            return value
        args, kwargs = self.before.get(node, (node.args, node.kwargs))
        if node in self.functional or node.target in IDENTITIES:
            return self._current(args[0], reader)
        if node.target in BY_LAYOUT or not self._inputs_in(storage, args, kwargs):
            raise _NotKnown
        value = self._insert(reader, node, node.target, args, kwargs)
        self.made[node] = value, owner
        return value

    def _inputs_in(self, storage: int, args: Any, kwargs: Any) -> list[fx.Node]:
        """Returns the arguments whose memory is `storage`."""
        found: list[fx.Node] = []
        fx.node.map_arg((args, dict(kwargs)), lambda n: found.append(n) if storage in _storages(n) else None)
        return found

    def _write(self, node: fx.Node) -> None:
        """Makes the new values of a storage after an in-place node."""
        view: fx.Node = node.args[0]  # type: ignore[assignment]
        (storage,) = _storages(view)
        value = self._insert(node, node, self.functional[node], node.args, node.kwargs)
        if not _alike(value.meta["val"], view.meta["val"], strides=False):
            raise _NotKnown
        made = {node: value}
        while view is not self.first[storage]:
            made[view] = value
            args, kwargs = self.before.get(view, (view.args, view.kwargs))
            if view not in self.functional and view.target not in IDENTITIES:
                if self._inputs_in(storage, args, kwargs) != [args[0]]:
                    raise _NotKnown
                value = self._scatter(node, view, (args, kwargs), value)
            view = args[0]
        if not _alike(value.meta["val"], view.meta["val"]):
            raise _NotKnown
        self.owner[storage] = value
        # If the new value's strides differ from the view's, use the view of the new owner instead.
        self.made.update({n: (v, value) for n, v in made.items() if _alike(v.meta["val"], n.meta["val"])})

    def _scatter(self, writer: fx.Node, view: fx.Node, arguments: tuple[Any, Any], value: fx.Node) -> fx.Node:
        """Returns the new value of the base of `view`, given the view's arguments and its new `value`."""
        (source, *rest), kwargs = arguments
        here, there = view.meta["val"], source.meta["val"]
        if _alike(here, there) and symbol(here.storage_offset()) == symbol(there.storage_offset()):
            return value
        if view.target in SCATTER:
            return self._insert(writer, writer, SCATTER[view.target], (source, value, *rest), kwargs)
        if view.target is aten.transpose.int:
            return self._insert(writer, writer, view.target, (value, *rest), kwargs)
        if view.target is aten.permute.default:
            count = len(rest[0])
            order = [d % count for d in rest[0]]
            back = [order.index(d) for d in range(count)]
            return self._insert(writer, writer, view.target, (value, back), {})
        if view.target is aten.unsqueeze.default:
            return self._insert(writer, writer, aten.squeeze.dim, (value, *rest), kwargs)
        raise _NotKnown

    def _insert(self, before: fx.Node, like: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Inserts a node before `before` that reads current values; copies the origin of `like`."""
        args, kwargs = fx.node.map_arg((args, dict(kwargs)), lambda n: self._current(n, before))  # type: ignore[misc]
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        self.inserted.append(node)
        with torch.no_grad():
            node.meta = {**like.meta, "val": fake_value(node)}
        return node

    def undo(self) -> None:
        """Restores the original graph."""
        for node, (args, kwargs) in self.before.items():
            node.args, node.kwargs = args, kwargs
        for node in reversed(self.inserted):
            self.graph.erase_node(node)


def _storages(node: Any) -> set[int]:
    """Returns the storages of the tensors that `node` produces."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    values = value if isinstance(value, (tuple, list)) else [value]
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


def _alike(a: Tensor, b: Tensor, strides: bool = True) -> bool:
    """Whether two tensors have the same dtype, device, shape and (if `strides`) strides."""
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    sizes = [*zip(a.shape, b.shape), *(zip(a.stride(), b.stride()) if strides else ())]
    return all(symbol(x) == symbol(y) for x, y in sizes)


def _is_view(op: Any) -> bool:
    """Whether every result of `op` shares memory with an argument."""
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return False
    implicit = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    return bool(op.is_view) and not implicit  # a composite may copy


def _functional(op: Any) -> Any:
    """Returns the functional form of `op`, which writes only to its first argument."""
    name, overload = op._schema.name, op._overloadname
    arguments = op._schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    random = torch.Tag.nondeterministic_seeded in op.tags
    if not name.endswith("_") or written != [True] + [False] * (len(arguments) - 1) or random:
        raise _NotKnown
    packet = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None) if name.startswith("aten::") else None
    found = getattr(packet, overload, None) if packet is not None else None
    if found is None or torch.Tag.inplace_view in op.tags:
        raise _NotKnown
    if [(a.name, str(a.type)) for a in found._schema.arguments] != [(a.name, str(a.type)) for a in arguments]:
        raise _NotKnown
    return found
