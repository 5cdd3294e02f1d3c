"""Carries out a plan on a graph: takes blocks where a rank needs them, and puts in the ranks' conversations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.ir.fx import fake_value, is_op, named_args, op_args, parameters, set_args
from kvrewrite.ir.parallel import Peers
from kvrewrite.passes.shard.cache_rules import FirstHead
from kvrewrite.passes.shard.placement import Split, Want, mapped
from kvrewrite.passes.shard.plan import Plan
from kvrewrite.passes.shard.rules import Answer

aten = torch.ops.aten
ops = torch.ops.kvrewrite
comm = torch.ops._c10d_functional
REDUCE, GATHER, WAIT = comm.all_reduce.default, comm.all_gather_into_tensor.default, comm.wait_tensor.default
ADDLESS: dict[Any, Any] = {aten.addmm.default: aten.mm.default}  # a product without its bias


class Writer:
    """Makes of a whole graph that of a rank, which is another one. plan: of the whole graph's nodes."""

    def __init__(self, source: fx.Graph, plan: Plan, peers: Peers):
        self.plan, self.rank, self.ranks, self.group = plan, peers.rank, peers.ranks, peers.group
        self.graph = fx.Graph()
        self._now: dict[fx.Node, Any] = {}  # what a node of the source is here: another node, or a number
        self.graph.output(self.graph.graph_copy(source, self._now))
        for node in source.nodes:
            if node.op == "output":
                self._now[node] = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        self._made: dict[tuple[fx.Node, Split | None], fx.Node] = {}

    def run(self) -> fx.Graph:
        """Writes everything; returns the rank's graph."""
        for source in self.plan.order:
            place, node = self.plan.places.get(source), self._now[source]
            if source in self.plan.answers:
                self._write(source, node, self.plan.answers[source])
            elif isinstance(place, Split):
                _cut_value(node, place, self.ranks)
        self.graph.lint()
        return self.graph

    def _write(self, source: fx.Node, node: fx.Node, found: Answer) -> None:
        def given(value: Any) -> Any:
            if isinstance(value, FirstHead):
                return int(value) * self.rank
            if isinstance(value, fx.Node):  # a size
                return self._now[value]
            return self._convert(value, node) if isinstance(value, Want) else value

        node.args, node.kwargs = mapped(tuple(found.args), given), mapped(found.kwargs, given)
        if found.shared:
            self._share(node)
        if found.constant is not None:
            self._now[source] = found.constant
        elif found.reduce:
            self._now[source] = self._reduce(source, node, found)
        elif isinstance(found.out, Split):
            _cut_value(node, found.out, self.ranks)
        elif isinstance(found.out, tuple):
            node.meta.pop("val", None)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        if all(n.meta.get("val") is not None for n in node.all_input_nodes):
            node.meta["val"] = fake_value(node)
        return node

    # -- budgets that heads of all ranks share -----------------------------------------------------------------------
    def _share(self, node: fx.Node) -> None:
        """What the heads of this rank keep is decided among all ranks."""
        who = {"rank": self.rank, "ranks": self.ranks, "group": self.group}
        if is_op(node, ops.share_layers.default):
            node.target = ops.share_layers_together.default  # it takes the same, and then who asks
            set_args(node, **who)
            return
        target = ops.shared_budgets.default
        args = {n: v for n, v in named_args(node).items() if n in parameters(target)}
        with self.graph.inserting_before(node):
            keep = self.graph.call_function(target, op_args(target, **args, **who))
            floor = self.graph.call_function(aten.full_like.default, (args["floor"], -1.0))
        set_args(node, keep=keep, floor=floor)

    # -- sums --------------------------------------------------------------------------------------------------------
    def _reduce(self, source: fx.Node, node: fx.Node, found: Answer) -> fx.Node:
        """The sum of all ranks' parts, and the bias."""
        rows = self.plan.tables.get(source)
        elsewhere = None if rows is None else self._own_tokens(node, rows)
        if found.bias is not None:
            node.target = ADDLESS.get(node.target, node.target)
        following = node.next
        with self.graph.inserting_before(following):
            total = node if elsewhere is None else self._call(aten.masked_fill.Scalar, node, elsewhere, 0)
            total = self._call(WAIT, self._call(REDUCE, total, "sum", self.group))
            if found.bias is not None:
                total = self._call(aten.add.Tensor, total, self._convert(found.bias, following))
        return total

    def _own_tokens(self, node: fx.Node, rows: int) -> fx.Node:
        """Tokens of other ranks look up row 0; returns which they are (..., 1)."""
        ((start, count),) = Split(0, (rows,)).blocks(self.rank, self.ranks)
        with self.graph.inserting_before(node):
            own = self._call(aten.sub.Tensor, node.args[1], start)
            before = self._call(aten.lt.Scalar, own, 0)
            elsewhere = self._call(aten.logical_or.default, before, self._call(aten.ge.Scalar, own, count))
            node.args = (node.args[0], self._call(aten.masked_fill.Scalar, own, elsewhere, 0))
            node.kwargs = {}
            return self._call(aten.unsqueeze.default, elsewhere, -1)

    # -- from one placement to another -------------------------------------------------------------------------------
    def _convert(self, want: Want, before: fx.Node) -> Any:
        """The node as it is wanted, made right before its first reader."""
        source, split = want
        node, have = self._now[source], self.plan.places.get(source)
        if have == split or not isinstance(have, (Split, type(None))):
            return node
        whole = self._gather(source, node, have, before) if have is not None else node
        return whole if split is None else self._take(source, whole, split, before)

    def _take(self, source: fx.Node, whole: fx.Node, split: Split, before: fx.Node) -> fx.Node:
        """A rank's blocks of a whole tensor."""
        if (source, split) not in self._made:
            with self.graph.inserting_before(before):
                pieces = [
                    self._call(aten.slice.Tensor, whole, split.dim, start, start + length)
                    for start, length in split.blocks(self.rank, self.ranks)
                ]
                made = pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, split.dim)
            self._made[source, split] = made
        return self._made[source, split]

    def _gather(self, source: fx.Node, node: fx.Node, split: Split, before: fx.Node) -> fx.Node:
        """The whole tensor, on every rank."""
        if (source, None) not in self._made:
            with self.graph.inserting_before(before):
                at, pieces = 0, []
                for part in split.parts:
                    own = node
                    if len(split.parts) > 1:
                        end = at + part // self.ranks
                        own = self._call(aten.slice.Tensor, node, split.dim, at, end)
                        at = end
                    pieces.append(self._gather_part(own, split.dim))
                made = pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, split.dim)
            self._made[source, None] = made
        return self._made[source, None]

    def _gather_part(self, node: fx.Node, dim: int) -> fx.Node:
        """Blocks are put together along the first dimension, so theirs becomes that."""
        own = self._call(aten.transpose.int, node, 0, dim) if dim else node
        own = self._call(aten.clone.default, own)
        own.kwargs = {"memory_format": torch.contiguous_format}
        found = self._call(WAIT, self._call(GATHER, own, self.ranks, self.group))
        return self._call(aten.transpose.int, found, 0, dim) if dim else found


def _cut_value(node: fx.Node, split: Split, ranks: int) -> None:
    """What is known of a node's tensor, for a rank."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = list(value.shape)
        sizes[split.dim] = split.size // ranks
        node.meta["val"] = value.new_empty(sizes)


__all__ = ["GATHER", "REDUCE", "WAIT", "Writer"]
