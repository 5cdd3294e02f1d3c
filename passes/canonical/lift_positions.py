"""Adds a position input to models that compute positions from the length.

A cache needs the position of every token of every row. Models that write `arange(length)`, or take the first rows of a
table, have the positions 0, 1, 2, ... built in, the same for all rows. The nodes from such a source up to where they
meet data are a function of positions alone. It is evaluated on the positions of all rows, flattened, and split into
rows again where it meets data. The function must treat every position independently; this is checked by evaluating it
on positions in another order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import (
    add_placeholder,
    ancestors,
    dependents,
    erase_dead,
    is_op,
    is_size,
    module_path,
    placeholder,
    shape_of,
    symbol,
    tensor_of,
)
from kvrewrite.passes.canonical.canonicalize import add_call, sizes_first
from kvrewrite.passes.canonical.probe import Probe, ProbeError, depends_on_data, only_shape, value_inputs

aten = torch.ops.aten

ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
JOINS = (aten.cat.default, aten.stack.default)  # besides pointwise ops
CHECK_LENGTH = 6


def lift_positions(captured: Captured) -> None:
    """Requires: a canonical graph (no masks left).

    Ensures: no live node depends on built-in positions. If there were any, the graph has an input `position_ids`
    (batch, length) int64; a row's positions need not begin at 0 nor equal another row's. Raises UnsupportedModelError
    with the node and the reason if that can't be done.
    """
    gm = captured.graph
    given = placeholder(gm, "position_ids")
    if given is not None and not given.users:
        _like_ids(gm, given)
    data = _data(captured)
    sources = [n for n in gm.graph.nodes if n not in data and _is_source(captured, n, data)]
    if sources:
        _Lifter(captured, sources, data).run()
        erase_dead(gm)
        gm.graph.lint()
        gm.recompile()
    _check_none_left(captured)


def _data(captured: Captured) -> set[fx.Node]:
    """Returns the nodes whose values depend on the inputs' values (not only on their sizes)."""
    found: set[fx.Node] = set()
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder" or (any(i in found for i in node.all_input_nodes) and not only_shape(node)):
            found.add(node)
    return found


def _length_dims(captured: Captured, node: fx.Node) -> list[int]:
    value = tensor_of(node)
    return [] if value is None else [d for d, s in enumerate(value.shape) if symbol(s) == captured.length_symbol]


def _is_source(captured: Captured, node: fx.Node, data: set[fx.Node]) -> bool:
    """Whether `node` makes positions: an arange over the length, a running sum of ones, or a table's first rows."""
    if is_op(node, *ARANGES):
        return bool(_length_dims(captured, node))
    if is_op(node, aten.cumsum.default):
        return _line(captured, node) is not None
    if is_op(node, aten.slice.Tensor):
        table, dim = node.args[0], _argument(node, 1, "dim", 0)
        assert isinstance(table, fx.Node)
        here, before = _length_dims(captured, node), _length_dims(captured, table)
        return dim % len(shape_of(node)) in here and not before
    return False


def _line(captured: Captured, node: fx.Node) -> tuple[int, int] | None:
    """Returns (first, step) of a sum over the length, (length,) or (1 or batch, length), with one step per token."""
    dims, rank = _length_dims(captured, node), len(shape_of(node))
    count = min(CHECK_LENGTH, captured.max_positions or CHECK_LENGTH)
    if dims != [rank - 1] or rank > 2 or count < 2:
        return None
    if rank == 2 and symbol(shape_of(node)[0]) not in (1, captured.batch_symbol):
        return None
    try:
        value = Probe(captured, 1, count)(node).flatten()
    except ProbeError:
        return None
    first, step = value[0].item(), (value[1] - value[0]).item()
    if not torch.equal(value, first + step * torch.arange(count).to(value.dtype)) or first % 1 or step % 1:
        return None
    return int(first), int(step)


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _refuse(node: fx.Node, reason: str) -> UnsupportedModelError:
    where = module_path(node) or "the model itself"
    return UnsupportedModelError(f"the positions that {where} builds in can't become an input: {reason} ({node.name})")


def _like_ids(gm: fx.GraphModule, positions: fx.Node) -> None:
    """Gives the input `positions` the symbolic shape of `input_ids`; an unused input has its own symbols."""
    ids = placeholder(gm, "input_ids")
    value, found = tensor_of(ids), tensor_of(positions)
    assert value is not None
    if found is None or [symbol(s) for s in found.shape] != [symbol(s) for s in value.shape]:
        positions.meta["val"] = value.new_empty(value.shape, dtype=torch.int64)


class _Lifter:
    """Rewrites one graph. `lifted` maps nodes of the positional region to their counterparts over all positions."""

    def __init__(self, captured: Captured, sources: list[fx.Node], data: set[fx.Node]):
        self.captured, self.gm, self.data = captured, captured.graph, data
        self.sources = sources
        region = dependents(sources, stop=lambda n: n in data)
        # Includes what it is joined with, such as zeros over the length.
        region |= {
            n for n in ancestors(region - data, stop=lambda n: n in data or n in sources) if _length_dims(captured, n)
        }
        self.region = [n for n in self.gm.graph.nodes if n in region and n not in data and n.op == "call_function"]
        self.boundary = [n for n in self.gm.graph.nodes if n in region and n in data]
        self.lifted: dict[fx.Node, fx.Node] = {}
        self.split: dict[tuple[fx.Node, int, int, int], fx.Node] = {}

    def run(self) -> None:
        self.positions = self._positions()
        self.flat, self.count = self._flat()
        if any(n.op == "output" for n in self.boundary):
            raise _refuse(self.region[-1], "they are part of the output")
        for node in self.region:
            with self.gm.graph.inserting_before(node):
                new = self._lift_source(node) if node in self.sources else self._lift(node)
            new.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack"))
            self.lifted[node] = new
        self._check_by_evaluation({n for u in self.boundary for n in u.all_input_nodes if n in self.lifted})
        for user in self.boundary:
            for node in [n for n in user.all_input_nodes if n in self.lifted]:
                user.replace_input_with(node, self._at(node, user))

    def _positions(self) -> fx.Node:
        node = placeholder(self.gm, "position_ids") or add_placeholder(self.gm, "position_ids")
        _like_ids(self.gm, node)
        self.data.add(node)
        return node

    def _flat(self) -> tuple[fx.Node, fx.Node]:
        """Returns all rows' positions one after another (batch * length,), and their number."""
        self.batch, self.length = sizes_first(self.captured)
        with self.gm.graph.inserting_after(self.length):
            flat = add_call(self.gm, aten.reshape.default, self.positions, [-1])
        with self.gm.graph.inserting_after(flat):
            count = self.gm.graph.call_function(aten.sym_size.int, (flat, 0))
        count.meta["val"] = shape_of(flat)[0]
        return flat, count

    def _lift_source(self, node: fx.Node) -> fx.Node:
        gm = self.gm
        if is_op(node, aten.slice.Tensor):
            table, dim, start = node.args[0], _argument(node, 1, "dim", 0), _argument(node, 2, "start", None) or 0
            if not isinstance(start, int) or _argument(node, 4, "step", 1) != 1:
                raise _refuse(node, "a table is read at positions that are not its first rows")
            index = add_call(gm, aten.add.Tensor, self.flat, start) if start else self.flat
            return add_call(gm, aten.index_select.default, table, dim, index)
        start, step = 0, 1
        if is_op(node, aten.cumsum.default):
            line = _line(self.captured, node)
            assert line is not None
            start, step = line
        elif not is_op(node, aten.arange.default):
            start = node.args[0]  # type: ignore[assignment]
            step = _argument(node, 2, "step", 1)
        if isinstance(start, fx.Node) or isinstance(step, fx.Node):
            raise _refuse(node, "they begin at a number that depends on the length")
        new = self.flat
        if step != 1:
            new = add_call(gm, aten.mul.Tensor, new, step)
        if start != 0:
            new = add_call(gm, aten.add.Tensor, new, start)
        wanted, got = tensor_of(node), tensor_of(new)
        assert wanted is not None and got is not None
        if wanted.dim() == 2:
            new = add_call(gm, aten.unsqueeze.default, new, 0)
        return new if wanted.dtype == got.dtype else add_call(gm, aten._to_copy.default, new, dtype=wanted.dtype)

    def _lift(self, node: fx.Node) -> fx.Node:
        """Lifts `node` to all rows' positions: the length becomes batch * length, and the batch size 1."""
        value = node.meta.get("val")
        if isinstance(value, Tensor) and len(_length_dims(self.captured, node)) > 1:
            raise _refuse(node, "positions are combined with each other, outside of any attention")

        def replaced(argument: Any) -> Any:
            if isinstance(argument, fx.Node) and not is_size(argument):
                return self.lifted.get(argument, argument)
            if isinstance(argument, fx.Node):
                return self._size(argument)
            return argument

        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), replaced)  # type: ignore[misc]
        try:
            return add_call(self.gm, node.target, *args, **kwargs)  # type: ignore[arg-type]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise _refuse(node, f"{node.target} fails on the positions of several rows: {error}") from error

    def _size(self, node: fx.Node) -> Any:
        """Lifts a size inside the region: length and batch size in it become batch * length and 1."""
        expr = symbol(node.meta["val"])
        if expr == self.captured.batch_symbol:
            return 1
        product = self.captured.batch_symbol * self.captured.length_symbol
        if expr == self.captured.length_symbol or expr == product:
            return self.count
        symbols: set[Any] = getattr(expr, "free_symbols", set())
        if not symbols & {self.captured.batch_symbol, self.captured.length_symbol}:
            return node
        if self.captured.length_symbol not in symbols:
            return int(expr.subs({self.captured.batch_symbol: 1}))
        raise _refuse(node, f"a size of {expr} is made of the length")

    def _at(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """Returns the lifted `node` in the shape that `user`, where it meets data, needs: with a batch dim."""
        lifted, shape, out = self.lifted[node], shape_of(node), tensor_of(user)
        lengths = _length_dims(self.captured, node)
        if not lengths:
            return lifted  # it is over batch * length already, row after row like the flat positions
        if out is None or not (_is_pointwise(user) or is_op(user, *JOINS)):
            raise _refuse(user, f"they are given to {user.target}, which does not treat every position by itself")
        if is_op(user, aten.stack.default):
            raise _refuse(user, "they are stacked with data")
        rank, length = out.dim(), lengths[0] + out.dim() - len(shape)
        batches = [d for d, s in enumerate(out.shape) if symbol(s) == self.captured.batch_symbol]
        if len(batches) != 1 or symbol(out.shape[length]) != self.captured.length_symbol:
            got = tuple(map(str, out.shape))
            raise _refuse(user, f"they meet data of shape {got}, where batch is no dim of its own")
        batch = batches[0]
        key = (node, rank, length, batch)
        if key not in self.split:
            with self.gm.graph.inserting_before(lifted.next):
                self.split[key] = self._split(lifted, rank, length, batch)
        return self.split[key]

    def _split(self, lifted: fx.Node, rank: int, length: int, batch: int) -> fx.Node:
        """Splits (..., batch * length at dim `length`, ...), padded to `rank` dims: (..., batch, ..., length, ...)."""
        shape: list[Any] = list(shape_of(lifted))
        shape = [1] * (rank - len(shape)) + shape
        if symbol(shape[batch]) != 1:
            raise _refuse(lifted, "they have a dim of their own where the data has the rows of the batch")
        shape[length : length + 1] = [self.batch, self.length]
        one = batch if batch < length else batch + 1  # where the dim of size 1 that the rows replace is now
        order = [d for d in range(rank + 1) if d not in (length, one)]
        order.insert(batch, length)
        if order == sorted(order):
            return add_call(self.gm, aten.reshape.default, lifted, [shape[d] for d in order])
        node = add_call(self.gm, aten.reshape.default, lifted, shape)
        node = add_call(self.gm, aten.permute.default, node, [*order, one])
        return add_call(self.gm, aten.squeeze.dim, node, -1)

    @torch.no_grad()
    def _check_by_evaluation(self, nodes: Iterable[fx.Node]) -> None:
        """Compares the lifted region, on two rows of fewer positions in another order, with the original region."""
        limit = self.captured.max_positions or CHECK_LENGTH
        count = min(CHECK_LENGTH, limit)
        rows = torch.stack([torch.arange(count).flip(0).roll(1), torch.arange(count).roll(2)])[:, : max(1, count - 2)]
        order = rows.flatten()
        before = Probe(self.captured, 1, count)
        after = Probe(self.captured, 2, rows.shape[1], {self.positions: rows})
        # Random stand-ins for weights without data must be the same in both.
        for node in self.gm.graph.nodes:
            if node.op == "get_attr" and any(u in self.lifted or u in set(self.lifted.values()) for u in node.users):
                after.values[node] = before(node)
        for node in nodes:
            dims = _length_dims(self.captured, node)
            try:
                expected, got = before(node), after(self.lifted[node])
            except ProbeError as error:
                raise _refuse(node, str(error)) from error
            if not dims:
                product = self.captured.batch_symbol * self.captured.length_symbol
                dims = [d for d, s in enumerate(shape_of(node)) if symbol(s) == product]
            if not dims:
                raise _refuse(node, "something is computed over all positions at once")
            dim = dims[0]
            expected = expected.index_select(dim, order)
            if got.shape != expected.shape or not torch.allclose(got, expected, equal_nan=True):
                raise _refuse(node, "what is computed for one position depends on the others, or on how many there are")


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _check_none_left(captured: Captured) -> None:
    """Refuses graphs with a value that varies along the length and depends on no input."""
    probe = Probe(captured, 2, min(CHECK_LENGTH, captured.max_positions or CHECK_LENGTH))
    data = _data(captured)
    for node in captured.graph.graph.nodes:
        if node in data or node.op != "call_function" or is_size(node) or not any(u in data for u in node.users):
            continue
        dims = _length_dims(captured, node)
        if not dims:
            continue
        try:
            value = probe(node)
        except ProbeError as error:
            raise _refuse(node, str(error)) from error
        if any(not torch.equal(value, value.narrow(d, 0, 1).expand_as(value)) for d in dims):
            raise _refuse(node, "they are made by something else than an arange or a table")


LOOKUPS = (aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default)


def limit_positions(captured: Captured) -> None:
    """Requires lifted positions. Sets `captured.max_positions` to what the tables that positions look up allow."""
    for node in captured.graph.graph.nodes:
        if node.op != "call_function" or node.target not in LOOKUPS:
            continue
        table, index, dim = node.args[0], node.args[1], 0
        if node.target in (aten.index_select.default, aten.gather.default):
            index, dim = node.args[2], node.args[1]
        if isinstance(index, (list, tuple)):
            index = index[0]
        reads_positions = isinstance(index, fx.Node) and any(
            n.op == "placeholder" and n.target == "position_ids" for n in value_inputs([index])
        )
        if not reads_positions or depends_on_data(index) or not isinstance(table.meta["val"].shape[dim], int):
            continue
        try:
            rows_read = sorted(set(Probe(captured, 1, 2)(index).flatten().tolist()))
        except ProbeError:
            continue
        if len(rows_read) == 2 and rows_read[1] - rows_read[0] == 1:  # position p looks up row first + p
            rows = table.meta["val"].shape[dim] - int(rows_read[0])
            captured.max_positions = rows if captured.max_positions is None else min(rows, captured.max_positions)
